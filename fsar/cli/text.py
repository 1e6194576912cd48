"""The command `fsar-text`: encode the names of classes by CLIP's text tower."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import torch
from torch import Tensor

from fsar.cli.help import Command
from fsar.methods.class_text import ClassText, class_words, prompts, write_class_text
from fsar.trunks.clip_text import ClipText, ClipTokenizer
from fsar.trunks.weight_files import read_tensors
from shards_spec import ShardSet
from shards_spec.cli.console import run_command, shards_option
from shards_spec.errors import ConfigError
from shards_spec.remote.shards import RemoteShards

FILE = click.Path(path_type=Path)
TOGETHER = 64  # texts that go through the tower at once


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--clip",
    type=FILE,
    required=True,
    help="OpenAI's file of the trunk's CLIP model: RN50.pt, ViT-B-16.pt.",
)
@click.option("--vocabulary", type=FILE, required=True, help="bpe_simple_vocab_16e6.txt.gz of the CLIP repository.")
@shards_option("Shard set whose classes, of all splits, are written.", required=False)
@click.option("--classes", type=FILE, help="Instead of --shards: a text file, a class name a line.")
@click.option("--template", default="a photo of {}", show_default=True, help="{} stands for the words of a class.")
@click.option("--out", type=FILE, required=True, help="The file to write, such as text.safetensors.")
def cli(
    clip: Path, vocabulary: Path, folder: Path | RemoteShards | None, classes: Path | None, template: str, out: Path
) -> None:
    """Write the text vectors of classes, for fsar-train --method clip-fsar --class-text FILE.

    Underscores in names become blanks, and CamelCase is split: HandstandPushups becomes "handstand
    pushups".
    """
    names = list({class_words(name): name for name in class_names(folder, classes)}.values())  # one for "a_b" and "AB"
    texts = prompts(names, template)
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    tokens = ClipTokenizer(vocabulary)
    vectors = encode(ClipText.of_state(read_tensors(clip)), tokens, texts)
    source = f"{clip.name} sha256:{hashlib.sha256(clip.read_bytes()).hexdigest()}"
    write_class_text(out, ClassText(tuple(names), vectors, template, source))
    click.echo(f'{out}: {len(names)} texts of width {vectors.shape[1]}, such as "{texts[0]}"')


def class_names(folder: Path | RemoteShards | None, file: Path | None) -> list[str]:
    """List the classes of a shard set or of a text file, whichever is given.

    Raises:
        ConfigError: both or none are given, or there is no such file, or no class in it.
    """
    if (folder is None) == (file is None):
        raise ConfigError("give --shards DIR, or --classes FILE with a name a line")
    if folder is not None:
        with ShardSet.open(folder) as shards:
            return list(shards.dataset.classes)
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {file} cannot be read as text ({error})") from error
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise ConfigError(f"--classes {file} names no class; write one a line")
    return names


@torch.no_grad()
def encode(tower: ClipText, tokens: ClipTokenizer, texts: list[str]) -> Tensor:
    """Encode texts to vectors [n, w].

    Raises:
        ConfigError: the vocabulary is not that of the tower.
    """
    known, length = len(tower.token_embedding.weight), len(tower.positional_embedding)
    rows = tokens(texts)  # [n, length]
    if (known, length) != (tokens.size, rows.shape[1]):
        raise ConfigError(
            f"the text tower knows {known} tokens and reads {length}, the vocabulary has {tokens.size} "
            f"and makes {rows.shape[1]}; give the files of one CLIP model"
        )
    return torch.cat([tower(rows[start : start + TOGETHER]) for start in range(0, len(rows), TOGETHER)])


def main() -> None:
    """Entry point."""
    run_command(cli, again="nothing was written")


if __name__ == "__main__":
    main()
