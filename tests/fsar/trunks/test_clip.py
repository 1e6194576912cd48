"""CLIP's towers, its published files, which are read without running them, and its tokens."""

from __future__ import annotations

import gzip
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fsar.trunks.clip_text
from fsar.methods import create_method
from fsar.run.weights import load_trunk_weights
from fsar.trunks.clip import ClipResNet, ClipViT, TransformerBlock
from fsar.trunks.clip_text import ClipText, ClipTokenizer, byte_symbols, read_merges
from fsar.trunks.weight_files import is_torchscript, read_tensors, read_torchscript
from shards_spec.errors import ConfigError

SCRIPTED = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


def small_towers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "clip-rn50": ClipResNet(depths=(1, 1, 1, 1), width=8, heads=4, channels=24, size=64),
        "clip-vit-b16": ClipViT(width=32, depth=2, heads=4, channels=24, size=64),
    }


class WholeClip(nn.Module):
    """A model of CLIP's outline: a visual tower, and parts of a text tower."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.text_projection = nn.Parameter(torch.randn(3, 24))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.visual.encode(frames)


@pytest.mark.parametrize("name", ["clip-rn50", "clip-vit-b16"])
def test_towers_read_frames_of_one_size_and_offer_no_maps(name: str) -> None:
    tower = small_towers()[name].eval()
    clips = torch.randn(2, 3, 3, 64, 64)
    with torch.no_grad():
        features = tower(clips)
        alone = tower(clips[1:, 2:]).pooled
    assert features.maps is None
    assert features.pooled.shape == (2, 3, 24)
    torch.testing.assert_close(features.pooled[1:, 2:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="64x64, not 32x64; set crop = 64"):
        tower(clips[..., :32, :])


@pytest.mark.parametrize("name", ["clip-fsar", "hyrsm", "otam", "trx", "ctx", "prototype"])
def test_methods_that_read_frames_stand_on_the_towers(name: str) -> None:
    tower = small_towers()["clip-rn50"].eval()
    embedding = create_method(name, trunk=tower).eval().embed(tower(torch.randn(1, 8, 3, 64, 64)))
    assert embedding.tokens.isfinite().all()


def test_methods_that_pool_maps_refuse_the_towers() -> None:
    tower = small_towers()["clip-rn50"].eval()
    with pytest.raises(ConfigError, match="needs maps"):
        create_method("molo", trunk=tower).embed(tower(torch.randn(1, 8, 3, 64, 64)))


def test_a_block_is_that_of_torch() -> None:
    """The same layer from torch's own parts; its GELU is the quick one here, so that is put in."""
    torch.manual_seed(0)
    block, x = TransformerBlock(16, 4, causal=True).eval(), torch.randn(2, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    normed = block.ln_1(x)
    middle = x + block.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
    hidden = block.mlp.c_fc(block.ln_2(middle))
    expected = middle + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


# Published files


@SCRIPTED
@pytest.mark.parametrize("name", ["clip-rn50", "clip-vit-b16"])
@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_every_form_of_file_loads(tmp_path: Path, name: str, form: str) -> None:
    whole, path = WholeClip(small_towers()[name]).eval().half(), tmp_path / "model.pt"
    if form == "archive":
        torch.jit.save(torch.jit.trace(whole.float(), torch.zeros(1, 3, 64, 64)).half(), path)
    else:
        torch.save(whole.state_dict(), path)
    tower = small_towers()[name]
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(7.0)
    load_trunk_weights(tower, name, str(path))
    for key, value in whole.visual.state_dict().items():
        assert torch.equal(tower.state_dict()[key], value.float()), key
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


class Several(nn.Module):
    """Tensors of several kinds, among attributes of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.halved = nn.Parameter(torch.randn(3).half())
        self.register_buffer("turned", torch.arange(6).reshape(2, 3).t())
        self.register_buffer("part", torch.arange(10.0)[3:7:2])
        self.register_buffer("none", torch.zeros(0, 4))
        self.sizes: list[int] = [1, 2]
        self.names: dict[str, float] = {"a": 1.5}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@SCRIPTED
def test_an_archive_gives_its_tensors_back(tmp_path: Path) -> None:
    module, path = Several(), tmp_path / "module.pt"
    torch.jit.save(torch.jit.script(module), path)
    found, expected = read_torchscript(path), module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


class Touch:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("was-run"),))


class SetAttribute:
    def __reduce__(self) -> tuple:
        return (setattr, (Touch, "changed", 1))


def archive(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/constants.pkl", pickle.dumps(()))
        file.writestr("m/data/0", b"\0" * 8)
    return path


# One tensor of 4 float32 on a storage of 8 bytes.
BEYOND = (
    b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00(K\x04t(K\x01t\x89NtRsb."
)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            pickle.dumps(Touch()),
            r"names pathlib\..*which is no part of a module's tensors; no pickled code is ever run",
        ),
        (pickle.dumps({"a": SetAttribute()}), r"names builtins\.setattr"),
        (b"cos\nsystem\n(S'touch was-run'\ntR.", r"names os\.system"),
        (b"ctorch.jit\nload\n(S'x'\ntR.", r"names torch\.jit\.load"),
        (b"\x80\x02(X\x04\x00\x00\x00filectorch\nFloatStorage\ntQ.", "cannot be read as TorchScript"),
        (BEYOND, "cannot be read as TorchScript"),
        (b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "cannot be read as TorchScript"),
        (b"", "cannot be read as TorchScript"),
    ],
)
def test_hostile_and_damaged_archives_are_refused(tmp_path: Path, monkeypatch, data: bytes, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "model.pt", data)
    assert is_torchscript(path)
    with pytest.raises(ConfigError, match=sentence):
        load_trunk_weights(small_towers()["clip-rn50"], "clip-rn50", str(path))
    assert not Path("was-run").exists()


def test_fetch_takes_only_the_file_that_its_address_promises(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "clip-RN50.pt").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"cannot fetch https://.*/RN50\.pt \(invalid hash value\); download it"):
        load_trunk_weights(small_towers()["clip-rn50"], "clip-rn50", "fetch")
    ((url, digest),) = asked
    assert digest in url
    assert len(digest) == 64


# Texts


def small_text(**sizes: int) -> ClipText:
    torch.manual_seed(0)
    tower = ClipText(**({"tokens": 30, "length": 7, "width": 64, "depth": 2, "channels": 5} | sizes))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def test_the_text_tower_reads_up_to_the_end_token() -> None:
    tower = small_text()
    tokens = torch.tensor([[28, 3, 4, 29, 0, 0, 0], [28, 3, 4, 29, 7, 8, 9], [28, 4, 3, 29, 0, 0, 0]])
    vectors = tower(tokens)
    torch.testing.assert_close(vectors[0], vectors[1])  # what follows the end is not seen
    assert not torch.allclose(vectors[0], vectors[2], atol=1e-3)


def test_the_text_tower_is_read_off_a_whole_file(tmp_path: Path) -> None:
    tower, path = small_text(), tmp_path / "clip.pt"
    state = tower.state_dict() | {"visual.proj": torch.zeros(3), "logit_scale": torch.ones(())}
    torch.save({name: value.half() for name, value in state.items()}, path)
    again = ClipText.of_state(read_tensors(path))
    tokens = torch.tensor([[28, 3, 29, 0, 0, 0, 0]])
    torch.testing.assert_close(again(tokens), tower(tokens), atol=2e-2, rtol=2e-2)
    with pytest.raises(ConfigError, match="no CLIP text tower"):
        ClipText.of_state({"visual.proj": torch.zeros(3)})
    with pytest.raises(ConfigError, match="ln_final"):
        ClipText.of_state({name: value for name, value in state.items() if name != "ln_final.bias"})


PAIRS = ["c a", "ca t</w>", "p h", "o t", "ot o</w>"]


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch) -> Path:
    """A file of the published form with few merges."""
    monkeypatch.setattr(fsar.trunks.clip_text, "MERGES", len(PAIRS))
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *PAIRS, "l e"]).encode()))
    return path


def test_tokens_by_hand(vocabulary: Path) -> None:
    pytest.importorskip("tokenizers")
    tokens = ClipTokenizer(vocabulary)
    assert (tokens.start, tokens.end, tokens.size) == (517, 518, 519)
    symbols = byte_symbols()
    assert sorted(symbols[:94]) == [chr(c) for c in range(33, 127)]
    assert len(set(symbols)) == 256

    def end(letter: str) -> int:
        return 256 + symbols.index(letter)

    cat, photo, o = 512 + 1, [512 + 2, 512 + 4], symbols.index("o")
    rows = tokens(["A  PHOTO of\t12&amp;CAT's ", "", "cat " * 100, "\u00e9"])
    assert rows.shape == (4, 77)
    said = [517, end("a"), *photo, o, end("f"), end("1"), end("2"), end("&"), cat, symbols.index("'"), end("s"), 518]
    assert rows[0].tolist() == said + [0] * (77 - len(said))
    assert rows[1, :3].tolist() == [517, 518, 0]
    assert rows[2].tolist() == [517] + [cat] * 75 + [518]
    # Two bytes of UTF-8, each by its own symbol; decomposed text is the same.
    accent = [517, symbols.index("\u00c3"), end("\u00a9"), 518]
    assert rows[3, :4].tolist() == tokens(["e\u0301"])[0, :4].tolist() == accent


def test_files_that_are_no_vocabulary_are_refused(vocabulary: Path, monkeypatch, tmp_path: Path) -> None:
    assert read_merges(vocabulary)[1] == ("ca", "t</w>")
    other = tmp_path / "other.gz"
    other.write_bytes(b"plain text")
    with pytest.raises(ConfigError, match="give bpe_simple_vocab"):
        read_merges(other)
    monkeypatch.setattr(fsar.trunks.clip_text, "MERGES", 48_894)
    with pytest.raises(ConfigError, match="holds 6 merges, not 48894"):
        read_merges(vocabulary)


def test_without_the_package_the_extra_is_named(vocabulary: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'pip install "fsar\[clip\]"'):
        ClipTokenizer(vocabulary)
