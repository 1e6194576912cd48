"""All benchmarks of the CPU one after another: python -m benchmarks [NAME ...].

Each prints its table and writes its result and chart to benchmarks/results; the settings are chosen to end within a
quarter of an hour on two cores.  One that fails is named, and the others run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click

from benchmarks.chart import is_available
from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError, suggest

CORES = str(len(os.sched_getaffinity(0)))
# Module -> its settings
BENCHMARKS: dict[str, list[str]] = {
    "preprocess": ["--workers", CORES, "--rounds", "2"],
    "episodes": ["--rounds", "3", "--seconds", "1"],
    "index": ["--largest", "100000", "--name", "index-100k"],
    "step": ["--rounds", "2"],
    "evaluate": ["--seconds", "0.5"],
    "methods": ["--rounds", "3", "--seconds", "0.2"],
    "frozen": ["--rounds", "1"],
}


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Run all benchmarks, or those of these NAMES; exit code 1 where one has failed."""
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f'there is no benchmark "{name}": {suggest(name, BENCHMARKS)}')
    if not is_available():
        click.echo('no charts are drawn: matplotlib is not installed (pip install "fsar[bench]")')
    failed = [name for name in names or BENCHMARKS if not run(f"benchmarks.{name}", *BENCHMARKS[name])]
    if failed:
        raise click.exceptions.Exit(_say_failed(failed))


def run(module: str, *words: str) -> bool:
    """Run a module in a process of its own, and say how long it took; whether it has done its work."""
    click.echo(f"\n== python -m {module} {' '.join(words)}")
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
    click.echo(f"{module}: {f'failed with exit code {code}' if code else 'done'}, {time.monotonic() - began:.0f} s")
    return code == 0


def _say_failed(failed: list[str]) -> int:
    click.echo(f"failed: {', '.join(failed)}", err=True)
    return 1


if __name__ == "__main__":
    run_command(main, again="what was measured is written")
