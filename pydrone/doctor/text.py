"""The report of ``pydrone doctor`` as text."""

from __future__ import annotations

import textwrap
from typing import Any


def text(report: dict[str, Any]) -> str:
    """The report as text."""
    parts = {
        "Versions": _versions(report),
        "Devices": _devices(report),
        "Backends": _backends(report),
        "Self-test, against the reference": _self_tests(report),
        "Speed: time relative to a memcpy of the same bytes (lower is faster)": _speeds(report),
        "Advice": _wrapped(report["advice"]) or ["none: nothing to change"],
    }
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts.items() if lines
    )


def _wrapped(sentences: list[str]) -> list[str]:
    return [line for x in sentences for line in textwrap.wrap(f"* {x}", 116, subsequent_indent="  ")]


def _versions(report: dict[str, Any]) -> list[str]:
    own, python, build = report["pydrone"], report["python"], report["pydrone"]["build"]
    lines = [
        f"pydrone {own['version']} in {own['folder']}"
        + (f", built by {build['compiler']}" if build.get("compiler") else ""),
        f"Python {python['version']} on {python['system']}",
    ]
    there = [f"{name} {version}" for name, version in report["packages"].items() if version is not None]
    missing = [name for name, version in report["packages"].items() if version is None]
    return lines + [", ".join(there)] + ([f"not installed: {', '.join(missing)}"] if missing else [])


def _devices(report: dict[str, Any]) -> list[str]:
    cpu = report["cpu"]
    cores = f"{cpu['cores']} cores"
    if cpu["cores_allowed"] != cpu["cores"]:
        cores += f", {cpu['cores_allowed']} allowed"
    if cpu["cores_of_the_quota"] is not None:
        cores += f", a quota of {cpu['cores_of_the_quota']:g}"
    lines = [
        f"cpu: {cpu['model']}, {cpu['simd']}, {cores}, {cpu['threads']} threads, load {cpu['load']}, "
        f"{cpu['memory_gb']} GB, huge pages {cpu['huge_pages'] or 'not there'}"
    ]
    for i, gpu in enumerate(report["gpus"]):
        lines.append(f"cuda:{i}: {gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['capability']}")
    if not report["gpus"]:
        lines.append("cuda: none that torch can use")
    return lines


def _backends(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<10}{'usable' if reason is None else f'not usable: {reason}'}"
        for name, reason in report["backends"].items()
    ]
    return lines + [f"default on {device}: {name}" for device, name in report["default_backends"].items()]


def _self_tests(report: dict[str, Any]) -> list[str]:
    lines = []
    for test in report["self_tests"]:
        outcome = f"passed, {test['cases']} cases" if test["error"] is None else f"FAILED: {test['error']}"
        lines.append(f"{test['backend']:<10}{test['device']:<6}{test['kernel']:<10}{outcome}")
    return lines


def _speeds(report: dict[str, Any]) -> list[str]:
    lines = []
    for check in report["speed"]:
        threads = (
            "" if check["threads"] is None else f", {check['threads']} thread{'s' if check['threads'] > 1 else ''}"
        )
        ratios = ", ".join(f"{kernel} {ratio:g}" for kernel, ratio in check["ratios"].items())
        lines.append(
            f"{check['backend']} on {check['device']}{threads}, {check['num_envs']} x {check['num_steps']}: {ratios}; "
            f"memcpy {check['memcpy_gb_per_s']:g} GB/s"
        )
    return lines
