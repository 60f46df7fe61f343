"""An index of wheels that pip reads from a folder: the network is not asked."""

import hashlib
import zipfile


def write_wheel(folder, name, version, members):
    """Writes a wheel that pip takes, and returns its sha256."""
    stem, path = name.replace("-", "_"), folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{stem}-{version}.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere-to-be\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (members | texts).items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in (*members, *texts)))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def only_from(folder, monkeypatch):
    """Lets pip know this folder alone."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
