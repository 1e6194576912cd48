"""Text vectors of classes, in one small file a data set: training then runs no text tower."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards_spec.errors import ConfigError, suggest
from shards_spec.files import disk_errors, parse_json, write_whole

FORM = 'tensor "text" [n, w] of float32, metadata "names" (JSON list), "template", "source"'


@dataclass(frozen=True)
class ClassText:
    """A text vector for each class.

    Attributes:
        names: The classes.
        text: [n, w] float32, a vector each, not normalised.
        template: What was encoded, `{}` standing for the words of a class.
        source: What encoded it.
    """

    names: tuple[str, ...]
    text: Tensor
    template: str
    source: str

    def rows(self, names: Sequence[str]) -> Tensor:
        """Select the vectors [n, w] of classes; "ShootBall" and "shoot ball" are one name.

        Raises:
            ConfigError: some classes have no text.
        """
        places = {class_words(name): place for place, name in enumerate(self.names)}
        missing = [name for name in names if class_words(name) not in places]
        if missing:
            raise ConfigError(
                f"there is no text for {len(missing)} of {len(names)} classes ({', '.join(missing[:4])}), "
                f"{suggest(missing[0], self.names)}; write the texts of all classes with fsar-text"
            )
        return self.text[[places[class_words(name)] for name in names]]


def class_words(name: str) -> str:
    """Split a class name into words: at underscores, blanks and CamelCase, all in lower case.

    "HandstandPushups" -> "handstand pushups", "shoot_ball" -> "shoot ball".
    """
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.replace("_", " "))
    return " ".join(apart.lower().split())


def prompts(names: Sequence[str], template: str) -> list[str]:
    """Fill the words of each class into the `{}` of a template.

    Raises:
        ConfigError: the template has no `{}`, or more than one.
    """
    if template.count("{}") != 1:
        raise ConfigError(f'the template "{template}" must have one {{}} for the words of the class')
    words = [class_words(name).encode(errors="replace").decode() for name in names]  # "?" for bytes that are no text
    return [template.replace("{}", of_class) for of_class in words]


def write_class_text(path: Path, class_text: ClassText) -> None:
    """Write the file, whole or not at all.

    Raises:
        FsarError: the disk is full or refuses the write.
    """
    names = json.dumps(class_text.names)  # only ASCII, whatever bytes the names have
    metadata = {"names": names, "template": class_text.template, "source": class_text.source}
    with disk_errors(path):
        write_whole(path, save({"text": class_text.text.float().contiguous()}, metadata))


def read_class_text(path: Path) -> ClassText:
    """Read a file of class texts.

    Raises:
        ConfigError: the file does not exist, has another form, or names one class twice.
    """
    if not path.is_file():
        raise ConfigError(f"class_text {path}: there is no such file; fsar-text makes it")
    try:
        with safe_open(path, framework="pt") as file:
            text, metadata = file.get_tensor("text"), file.metadata() or {}
        names = tuple(parse_json(metadata["names"]))
        template, source = metadata["template"], metadata["source"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no file of class texts ({error}); expected {FORM}") from error
    good = text.dtype == torch.float32 and text.ndim == 2 and text.shape[1] > 0 and bool(text.isfinite().all())
    if not good or len(text) != len(names) or any(type(name) is not str for name in names):
        found = f"{text.dtype} {list(text.shape)} for {len(names)} names"
        raise ConfigError(f"{path} holds {found}; expected {FORM}, one finite row a name")
    places = {class_words(name): place for place, name in enumerate(names)}
    for place, name in enumerate(names):
        if (last := places[class_words(name)]) != place:
            raise ConfigError(f'{path} has two texts for one class, "{name}" and "{names[last]}"; keep one of them')
    return ClassText(names, text, template, source)
