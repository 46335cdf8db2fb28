"""Text encoders: of bytes, learned with the model, and a frozen T5, here tiny and random."""

import copy
import json
import logging
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.nn import text
from avdiffusion.nn.text import ByteEncoder, T5Encoder

SMALL = {"width": 16, "layers": 2, "heads": 2, "max_length": 12}


@pytest.fixture(autouse=True)
def _forgetful():
    text._pretrained.cache_clear()
    text.say_cut.cache_clear()


def said(caplog):
    """By us, whatever other packages of this process have to say."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("avdiffusion")]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ByteEncoder(**SMALL).eval()


def by_torch(encoder, sentence):
    """The vectors of one short text by torch's own layers, without padding: [1, n, D]."""
    tokens = torch.tensor([[*sentence.encode(), 256]])
    x = encoder.token(tokens) + encoder.position.weight[: tokens.shape[1]]
    for block in encoder.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True
        )
        parts = {
            "self_attn.in_proj_": block.qkv,
            "self_attn.out_proj.": block.out,
            "linear1.": block.up,
            "linear2.": block.down,
            "norm1.": block.attention_norm,
            "norm2.": block.norm,
        }
        layer.load_state_dict(
            {f"{k}{name}": v for k, part in parts.items() for name, v in part.state_dict().items()}
        )
        x = layer.train()(x)
    return encoder.norm(x)


@pytest.mark.parametrize("sentence", ["", "a", "grün", "rain falls!"])
def test_bytes_pass_a_pre_norm_transformer(encoder, sentence):
    found, mask = encoder([sentence], "cpu")
    expected = by_torch(encoder, sentence)
    length = len(sentence.encode()) + 1
    assert found.shape == (1, 12, 16)
    assert mask.dtype == torch.bool
    assert mask[0].tolist() == [True] * length + [False] * (12 - length)
    torch.testing.assert_close(found[:, :length], expected, rtol=1e-4, atol=1e-5)
    assert not found[:, length:].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=4))
def test_a_text_does_not_depend_on_its_neighbours(texts):
    torch.manual_seed(0)
    encoder = ByteEncoder(**SMALL)
    together, masks = encoder(texts, "cpu")
    assert masks.any(1).all()
    for sentence, found, mask in zip(texts, together, masks, strict=True):
        alone, its_mask = encoder([sentence], "cpu")
        torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(mask, its_mask[0])


def test_long_texts_are_cut_which_is_said_once(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        exact, mask = encoder(["eleven char"], "cpu")
        assert said(caplog) == []
        cut, _ = encoder(["eleven chars and more"], "cpu")
        encoder(["twelve chars"], "cpu")
    assert mask.all()
    assert torch.equal(cut, exact)
    assert said(caplog) == ["texts of more than 12 tokens are cut there: max_length allows more"]


def test_every_parameter_is_trained_and_a_copy_is_its_own(encoder):
    before = encoder(["a bird", ""], "cpu")[0].detach()
    twin = copy.deepcopy(encoder)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(encoder(["a bird", ""], "cpu")[0], before)
    assert not twin(["a bird"], "cpu")[0].any()

    weight = torch.linspace(-1, 1, before.numel()).view_as(before)  # a norm hides plain sums
    (encoder(["a bird", ""], "cpu")[0] * weight).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    used = set(b"a bird") | {256}
    assert set(encoder.token.weight.grad.any(1).nonzero().flatten().tolist()) == used


def test_mixed_precision_meta_and_dropout(encoder):
    exact, _ = encoder(["a bird"], "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = encoder(["a bird"], "cpu")
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)
    with torch.device("meta"):
        found, mask = ByteEncoder()(["a", "b"], "meta")
    assert found.shape == (2, 128, 256)
    assert mask.shape == (2, 128)
    dropping = ByteEncoder(**SMALL, dropout=0.5)
    dropping.load_state_dict(encoder.state_dict())
    assert not torch.equal(dropping(["a bird"], "cpu")[0], exact)
    assert torch.equal(dropping.eval()(["a bird"], "cpu")[0], exact)
    with pytest.raises(ValueError, match="a width of 10 does not split into 4 heads"):
        ByteEncoder(width=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random T5 with one token for each byte, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2
    )
    root = tmp_path_factory.mktemp("t5")
    transformers.T5EncoderModel(config).save_pretrained(root)
    transformers.ByT5Tokenizer().save_pretrained(root)
    return root


@pytest.fixture
def t5(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return T5Encoder(str(folder), width=32, max_length=12)


def hidden_states(folder, sentence):
    """By hand: bytes + 3, 1 at the end, 0 up to the length."""
    transformers = pytest.importorskip("transformers")
    ids = [byte + 3 for byte in sentence.encode()] + [1]
    seen = torch.tensor([[1] * len(ids) + [0] * (12 - len(ids))])
    ids = torch.tensor([ids + [0] * (12 - len(ids))])
    with torch.no_grad():
        return transformers.T5EncoderModel.from_pretrained(folder).eval()(ids, seen)[0]


def test_t5_gives_the_last_hidden_states_padded(t5, folder):
    found, mask = t5(["a bird", "grün", ""], "cpu")
    assert mask is None
    assert found.dtype == torch.float32
    for k, sentence in enumerate(["a bird", "grün", ""]):
        expected = hidden_states(folder, sentence)[0]
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-5)
    assert found[0, -1].any()  # padding too, as published
    masked = T5Encoder(str(folder), width=32, max_length=12, mask_padding=True)
    text._pretrained.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it computes in full precision
        again, mask = masked(["grün"], "cpu")
    torch.testing.assert_close(again[0], found[1], rtol=1e-4, atol=1e-5)
    assert mask.tolist() == [[True] * 6 + [False] * 6]


def test_t5_is_no_part_of_the_module(t5):
    t5(["a bird"], "cpu")
    assert not list(t5.parameters())
    assert not t5.state_dict()
    assert not list(t5.buffers())
    twin = copy.deepcopy(t5)
    assert twin(["a bird"], "cpu")[0].requires_grad is False
    assert not any(isinstance(value, torch.Tensor) for value in vars(twin).values())
    assert text._pretrained.cache_info().misses == 1  # they share it


def test_known_texts_are_not_encoded_again(t5, monkeypatch):
    monkeypatch.setattr(text, "KEPT", 2)
    asked = []
    once = text._Pretrained._embedded
    monkeypatch.setattr(
        text._Pretrained, "_embedded", lambda *args: (asked.append(args[1]), once(*args))[1]
    )
    first, _ = t5(["a", "b", "a"], "cpu")
    assert torch.equal(first[0], first[2])
    again, _ = t5(["b", "a"], "cpu")
    torch.testing.assert_close(again, first[:2].flip(0))
    again[:] = 0  # what is handed out is a copy
    assert torch.equal(t5(["a"], "cpu")[0], first[:1])
    t5(["c"], "cpu")  # now "b" has not been used for longest
    t5(["a", "c"], "cpu")
    t5(["b"], "cpu")
    assert asked == [["a"], ["b"], ["c"], ["b"]]  # one by one, whatever is beside it


def test_t5_on_meta_reads_nothing():
    found, mask = T5Encoder("nowhere", mask_padding=True)(["a", "b"], "meta")
    assert found.shape == (2, 128, 768)
    assert mask.shape == (2, 128)
    assert text._pretrained.cache_info().misses == 0


def test_what_is_wrong_with_a_t5_is_said(t5, folder, tmp_path, monkeypatch, caplog):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"is 32 wide, not 768: set its width=32"):
        T5Encoder(str(folder))(["a"], "cpu")
    with pytest.raises(ValueError, match=r"text encoder nobody/t5 cannot be had: .* local folder"):
        T5Encoder("nobody/t5")(["a"], "cpu")

    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = transformers.T5EncoderModel.from_pretrained(folder)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle: not even looked at
    with pytest.raises(ValueError, match=r"no file named model.safetensors"):
        T5Encoder(str(tmp_path), width=32)(["a"], "cpu")

    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no T5 but a bert"):
        T5Encoder(str(tmp_path))(["a"], "cpu")

    with caplog.at_level(logging.WARNING, "avdiffusion"):
        t5(["longer than it may be"], "cpu")
        t5(["another one, also too long"], "cpu")
    assert len(said(caplog)) == 1
    text._pretrained.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[text\]" -c constraints.txt'):
        t5(["a"], "cpu")


def test_code_that_comes_with_a_model_is_not_run(t5, folder, tmp_path):
    """Of a folder that asks for its own classes, none is imported."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        described = json.loads((tmp_path / name).read_text())
        value = "mine.C" if key == "AutoConfig" else [None, "mine.C"]
        described |= {"auto_map": {key: value}}
        (tmp_path / name).write_text(json.dumps(described))
    found, _ = T5Encoder(str(tmp_path), width=32, max_length=12)(["a"], "cpu")
    assert torch.equal(found, t5(["a"], "cpu")[0])
    assert not (tmp_path / "ran").exists()
