"""Models that come with Tandem are whole, and what their folders say of them is true."""

import json
import re

import pytest
from safetensors import safe_open

from services.engine.models import inventory
from services.engine.models.folder import resolve
from services.engine.models.shipped import SHIPPED
from services.engine.models.template import template_of
from services.engine.models.text import Tokenizer
from services.runtime.settings import ModelSettings

MOST_BYTES = 40_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_found_by_its_name_and_whole(tmp_path, name):
    folder = resolve(ModelSettings(name=name), tmp_path)
    assert folder.context_tokens == SHIPPED[name].context_tokens
    (entry,) = [e for e in inventory.entries(tmp_path) if e.name == name]
    inventory.check(entry)
    assert entry.nbytes < MOST_BYTES
    assert (folder.path / "README.md").is_file()
    assert not list(tmp_path.iterdir())  # nothing is fetched or converted


@pytest.fixture(scope="module")
def tiny():
    return resolve(ModelSettings(name="tiny-deepseek"))


def test_the_tensors_of_tiny_deepseek_are_those_of_its_config(tiny):
    c, found = tiny.config, {}
    with safe_open(tiny.path / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            found[name] = (part.get_dtype(), tuple(part.get_shape()))
    assert found == dict(expected_tensors(c))


def expected_tensors(c):
    """Names, types and shapes as DeepSeek releases V3."""
    hidden, heads, wide = c["hidden_size"], c["num_attention_heads"], c["moe_intermediate_size"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def plain(name, *shape):
        yield f"{name}.weight", ("BF16", shape)

    def blocks(name, rows, columns):
        yield f"{name}.weight", ("F8_E4M3", (rows, columns))
        yield f"{name}.weight_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))

    def feed_forward(name, inner):
        yield from blocks(f"{name}.gate_proj", inner, hidden)
        yield from blocks(f"{name}.up_proj", inner, hidden)
        yield from blocks(f"{name}.down_proj", hidden, inner)

    yield from plain("model.embed_tokens", c["vocab_size"], hidden)
    yield from plain("model.norm", hidden)
    yield from plain("lm_head", c["vocab_size"], hidden)
    last = c["num_hidden_layers"]
    for i in range(last + c["num_nextn_predict_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        latent = c["kv_lora_rank"]
        yield from plain(f"{layer}.input_layernorm", hidden)
        yield from plain(f"{layer}.post_attention_layernorm", hidden)
        yield from blocks(f"{attention}.q_a_proj", c["q_lora_rank"], hidden)
        yield from plain(f"{attention}.q_a_layernorm", c["q_lora_rank"])
        yield from blocks(f"{attention}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
        yield from blocks(f"{attention}.kv_a_proj_with_mqa", latent + rope, hidden)
        yield from plain(f"{attention}.kv_a_layernorm", latent)
        yield from blocks(f"{attention}.kv_b_proj", heads * (nope + value), latent)
        yield from blocks(f"{attention}.o_proj", hidden, heads * value)
        if i < c["first_k_dense_replace"]:
            yield from feed_forward(f"{layer}.mlp", c["intermediate_size"])
            continue
        yield from plain(f"{layer}.mlp.gate", c["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", ("F32", (c["n_routed_experts"],))
        yield from feed_forward(f"{layer}.mlp.shared_experts", wide * c["n_shared_experts"])
        for expert in range(c["n_routed_experts"]):
            yield from feed_forward(f"{layer}.mlp.experts.{expert}", wide)
    yield from plain(f"model.layers.{last}.enorm", hidden)
    yield from plain(f"model.layers.{last}.hnorm", hidden)
    yield from plain(f"model.layers.{last}.eh_proj", hidden, 2 * hidden)
    yield from plain(f"model.layers.{last}.embed_tokens", c["vocab_size"], hidden)
    yield from plain(f"model.layers.{last}.shared_head.norm", hidden)
    yield from plain(f"model.layers.{last}.shared_head.head", c["vocab_size"], hidden)


def test_a_chat_is_written_as_deepseek_writes_it(tiny):
    config = json.loads((tiny.path / "tokenizer_config.json").read_text())
    template = template_of(tiny.path, config, now=lambda: pytest.fail("no date is asked for"))
    said = template.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a dog?"},
            {"role": "assistant", "content": "A pet."},
            {"role": "user", "content": "And a cat?"},
        ]
    )
    begin, end = config["bos_token"], config["eos_token"]
    user, assistant = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
    assert said == (
        f"{begin}Be brief.{user}What is a dog?{assistant}A pet.{end}{user}And a cat?{assistant}"
    )
    assert tiny.eos_token_ids == (1,)
    assert tiny.bos_token_id == 0
    Tokenizer(tiny)


def test_the_cards_figures_are_those_of_a_model_that_has_learned_something(tiny):
    text = (tiny.path / "README.md").read_text()
    table = text.split("| domain | loss, nats a token |")[1]
    rows = re.findall(r"^\| (\w+) \|" + r" ([\d.]+) \|" * 6 + "$", table, re.MULTILINE)
    assert len(rows) == 6
    for _, *figures in rows:
        loss, bits, before_fp8, long, agreed, load = map(float, figures)
        assert loss < 4.5
        assert bits < 2.5
        assert abs(bits - before_fp8) < 0.02
        assert long < bits + 0.3
        assert agreed > 0.35
        assert load > 1.2
