"""Made-up documents."""


def document(package, index):
    words = " ".join(f"{package[0]}{index}w{place}" for place in range(40))
    header = f"{package}.part.function_{index}(value, other=None)"
    return f"{header}\n\nReturns {words} with some of the value.\n\nArgs:\n    value: x.\n"
