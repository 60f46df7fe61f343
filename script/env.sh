# Sourced by the other scripts: sets PYTHON to an interpreter that has what NEEDS names, and puts the repository on its
# path. The first of these serves: the active Python as it is, .venv as it is, .venv made from requirement.txt.
#   NEEDS=ranges   pyproject.toml's dependencies, any version in range: a Python of the user's own is not changed
#   NEEDS=text     these, and the packages that python_docs is the text of, in any version
#   NEEDS=pins     every line of requirement.txt and of what it includes, exactly
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=true OMP_WAIT_POLICY=PASSIVE

# Exits 0 if the interpreter has what is needed, and prints the pins that it differs from; else prints what is wrong.
satisfied() { # INTERPRETER NEEDS
    # The safe path leaves the caller's folder out: a packaging.py there is not ours.
    PYTHONSAFEPATH=1 "$1" - "$ROOT" "$2" <<'PY' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import tomllib

    from packaging.requirements import Requirement
except ImportError as error:
    print(f"no {error.name}")
    sys.exit(1)

root, needs = Path(sys.argv[1]), sys.argv[2]


def pinned(file, follow=True):
    for line in (root / file).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            if follow:
                yield from pinned(line.removeprefix("-r").strip())
        elif line.startswith("-e"):
            folder = root / line.removeprefix("-e").strip()
            yield Requirement(tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"])
        elif line:
            yield Requirement(line)


def faults(requirements):
    for wanted in requirements:
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield f"no {wanted.name}"
            continue
        if not wanted.specifier.contains(found, prereleases=True):  # a build such as +cu126 does not matter
            yield f"{wanted.name} {found}, not {wanted.specifier}"


def told(found):
    return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


if needs == "pins":
    required, pins = list(pinned("requirement.txt")), []
else:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [Requirement(line) for line in project["dependencies"]]
    pins = [pin for pin in pinned("requirement.txt", follow=False) if pin.specifier]  # the tasks serve uninstalled too
    if needs == "text":
        text = list(pinned("requirement-text.txt"))
        required += [Requirement(pin.name) for pin in text]
        pins += text
wrong, other = list(faults(required)), list(faults(pins))
if wrong or other:
    print(told(wrong or other))
sys.exit(bool(wrong))
PY
}

# Chooses PYTHON. What differs from the pins is said on stderr: stdout is the command's own.
choose_python() { # NEEDS
    local active venv="$ROOT/.venv/bin/python" differs lacks
    active="$(command -v python || command -v python3)" || {
        echo "no python on the PATH; Python 3.11 or later is needed" >&2
        return 2
    }
    PYTHON="$active"
    if ! differs="$(satisfied "$active" "$1")"; then
        lacks="$differs"
        PYTHON="$venv"
        if ! differs="$(satisfied "$venv" "$1")"; then
            echo "installing requirement.txt into $ROOT/.venv (once, some minutes); $active has ${lacks:-not what is needed}" >&2
            [ -x "$venv" ] || "$active" -m venv "$ROOT/.venv"
            # Compiled when first imported: most of it never is, and pip takes longer to compile all than for the rest.
            (cd "$ROOT" && "$venv" -m pip install --quiet --disable-pip-version-check --no-compile -r requirement.txt)
            if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then # else each start would compile anew, 15 seconds of it
                "$venv" -m compileall -qq -j 0 -x /tests/ "$ROOT/.venv/lib" || true # some are templates
            fi
            differs=""
        fi
    fi
    if [ -n "$differs" ]; then
        local what="versions"
        [ "$1" != text ] || what="versions, and with them the text that README's figures are of"
        echo "using $PYTHON as it is: $differs; for the exact $what: pip install -r requirement.txt in $ROOT, in an environment of its own" >&2
    fi
}

choose_python "${NEEDS:-ranges}"
