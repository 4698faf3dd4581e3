"""What the doctor found, for people."""

from __future__ import annotations

from typing import Any

_GIB = 2**30


def doctor_text(found: dict[str, Any]) -> str:
    """A page of facts, then backends, then libraries; a package comes last."""
    parts = [_facts(found), _reasons("backend", found["backends"]), _libraries(found)]
    if "package" in found:
        parts.append(_package(found["package"]))
    return "\n\n".join(parts)


def _facts(found: dict[str, Any]) -> str:
    rows = {
        "moac": f"{found['moac'] or 'not installed'}, Python {found['python']}",
        "system": found["system"],
        "processor": "{name}, {architecture}".format(**found["processor"]),
        "kernels": _kernels(found["processor"]["kernels"]),
        "cores": _cores(found["cores"]),
        "memory": _memory(found["memory"]),
        "compiler": _compiler(found["compiler"]),
        "work folder": _work_folder(found["work_folder"]),
    }
    return "\n".join(f"{name:<11}  {text}" for name, text in rows.items())


def _kernels(missing: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{name} needs {', '.join(lacking)}" if lacking else f"{name} runs here"
        for name, lacking in missing.items()
    )


def _cores(cores: dict[str, Any]) -> str:
    threads = "1 thread" if cores["threads"] == 1 else f"{cores['threads']} threads"
    return (
        f"{cores['cores']} on {cores['cpus']} of {cores['online']} CPUs: {threads} "
        f"({cores['reason']})"
    )


def _memory(memory: dict[str, int | None]) -> str:
    limit = memory["limit_bytes"]
    granted = "no limit of a control group" if limit is None else f"limit {_size(limit)}"
    return (
        f"{_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available, {granted}"
    )


def _compiler(compiler: dict[str, str | None]) -> str:
    if compiler["path"] is None or compiler["obstacle"]:
        return str(compiler["obstacle"])
    return f"{compiler['path']}, {compiler['version'] or 'which does not tell its version'}"


def _work_folder(folder: dict[str, Any]) -> str:
    if folder["obstacle"] is None:
        return f"{folder['path']}, {_size(folder['free_bytes'])} free"
    return f"{folder['path'] or 'none'} cannot be written ({folder['obstacle']})"


def _reasons(header: str, reasons: dict[str, str | None]) -> str:
    lines = [f"{header:<8}  here", f"{'-' * 8}  ----"]
    return "\n".join(lines + [f"{name:<8}  {why or 'runs'}" for name, why in reasons.items()])


def _libraries(found: dict[str, Any]) -> str:
    rows = [
        (name, library["wanted"] or "any", library["version"] or f"run {library['remedy']}")
        for name, library in found["libraries"].items()
    ]
    if not rows:
        return "moac is not installed, so what it needs is not known; run: pip install ."
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {wanted:<10}  {told}" for name, wanted, told in rows)


def _package(package: dict[str, Any]) -> str:
    chosen = package["backend"]
    kernels = f" ({package['kernels']})" if package["kernels"] else ""
    if kernels and not package["trusted"]:
        kernels += ", by kernels built here since its own are not trusted,"
    told = f"runs with {chosen}{kernels} in {package['dtype']}" if chosen else "cannot run here"
    return f"{package['path']} {told}\n\n" + _reasons("backend", package["backends"])


def _size(size: int | None) -> str:
    return "unknown" if size is None else f"{size / _GIB:.1f} GiB"
