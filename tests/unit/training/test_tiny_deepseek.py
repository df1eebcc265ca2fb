"""The trainer of tiny-deepseek, on a toy size."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.tiny_deepseek import export, tokens
from training.tiny_deepseek.corpus import Document, Domain
from training.tiny_deepseek.data import Tokens, Windows, held_out_windows
from training.tiny_deepseek.evaluate import answer, evaluate
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.optimizer import orthogonal
from training.tiny_deepseek.shape import Shape
from training.tiny_deepseek.together import Together
from training.tiny_deepseek.train import CHECKPOINT, Plan, Training, load, train

SHAPE = Shape(
    vocabulary=300, width=64, layers=2, heads=2, query_rank=32, latent_rank=32, nope=16, rope=16,
    value=16, dense_width=96, expert_width=32, experts=8, groups=4, kept_groups=2,
    trained_context=64, context_factor=4.0,
)  # fmt: skip
WORDS = "the cat sat on a mat and the dog ran to it . "


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found() -> Tokens:
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS.split(), 40)) for _ in range(60)]
    texts = [text + " " + WORDS * 3 for text in texts]
    plain = [Document(text) for text in texts]
    chats = [Document(turns=(f"{a}?", "the dog", "and?", "the cat")) for a in texts]
    names = {"scripture": plain, "dictionary": plain, "jargon": plain, "manual": plain}
    names |= {"code": plain, "chat": chats}
    domains = {name: Domain(documents[5:], documents[:5]) for name, documents in names.items()}
    tokenizer = tokens.train(domains, SHAPE.vocabulary, seed=0)
    train = {name: tokens.encode(tokenizer, domain.train) for name, domain in domains.items()}
    held = {name: tokens.encode(tokenizer, domain.held_out) for name, domain in domains.items()}
    return Tokens(tokenizer, train, held, {})


def plan(**changes) -> Plan:
    short = {"minutes": 1e9, "tokens_a_step": 256, "phases": ((1.0, 32),), "warmup_steps": 5}
    return Plan(**(short | changes))


@pytest.fixture(scope="module")
def trained(found) -> tuple[Training, list[tuple[float, float]]]:
    training = Training(SHAPE, plan(), found, Together())
    return training, [training.step() for _ in range(40)]


def test_losses_fall(trained, found):
    training, losses = trained
    (first, first_draft), (last, last_draft) = losses[0], losses[-1]
    assert abs(first - np.log(SHAPE.vocabulary)) < 0.3
    assert last < first - 2
    assert last_draft < first_draft - 1.5
    figures = evaluate(training.model, found, windows=2, length=32)["scripture"]
    assert 0 < figures.loss < first - 2
    assert 0 < figures.bits < figures.loss / np.log(2)
    assert figures.agreed > 0.3
    assert 1 <= figures.load <= SHAPE.experts / SHAPE.chosen


def test_the_routing_bias_follows_the_load(trained):
    for router in trained[0].model.routers():
        bias = router.e_score_correction_bias.clone()
        load = torch.arange(SHAPE.experts)
        router.balance(load, 0.5)
        moved = router.e_score_correction_bias - bias
        torch.testing.assert_close(moved, torch.tensor([0.5] * 4 + [-0.5] * 4))
        router.e_score_correction_bias.copy_(bias)


def test_a_token_sees_nothing_after_it(trained):
    model = trained[0].model
    ids = torch.randint(5, SHAPE.vocabulary, (1, 24))
    other = ids.clone()
    other[0, 15] = (ids[0, 15] + 1) % SHAPE.vocabulary
    with torch.no_grad():
        one, two = model(ids, draft=True), model(other, draft=True)
    for a, b in ((one.logits, two.logits), (one.drafts, two.drafts)):
        torch.testing.assert_close(a[:, :15], b[:, :15])
        assert not torch.allclose(a[:, 15], b[:, 15])


def test_a_draft_knows_the_hidden_state_before_its_token(trained):
    draft, seen = trained[0].model.draft, {}
    hooks = [
        draft.hnorm.register_forward_hook(lambda _, given, made: seen.update(hidden=made)),
        draft.eh_proj.register_forward_pre_hook(lambda _, given: seen.update(joined=given[0])),
    ]
    with torch.no_grad():
        trained[0].model(torch.arange(5, 15)[None], draft=True)
    for hook in hooks:
        hook.remove()
    before = seen["joined"][0, :, SHAPE.width :]
    assert torch.equal(before[0], torch.zeros(SHAPE.width))
    assert torch.equal(before[1:], seen["hidden"][0, :-1])


@pytest.mark.peer
@pytest.mark.parametrize("fp8", [False, True])
def test_transformers_computes_the_same_from_the_exported_folder(trained, found, tmp_path, fp8):
    transformers = pytest.importorskip("transformers")
    export.export(trained[0].model, found.tokenizer, tmp_path, fp8=fp8)
    ours = export.load(tmp_path)
    if fp8:  # it would dequantize with a package of its own: give it the weights that we read
        config = ours.shape.config() | {"torch_dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = {name: value.contiguous() for name, value in export.released(ours)}
        save_file(weights, tmp_path / export.WEIGHTS, metadata={"format": "pt"})
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(
        5, SHAPE.vocabulary, (2, 100)
    )  # past the trained context, where YaRN counts
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peer(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_exported_model_comes_back(trained, found, tmp_path):
    model = trained[0].model
    export.export(model, found.tokenizer, tmp_path, fp8=True)
    back = export.load(tmp_path)
    assert back.shape == SHAPE
    for (name, one), (_, two) in zip(export.released(model), export.released(back), strict=True):
        size = one.float().abs().max()
        assert (one - two).abs().max() <= size / 16, name
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("the cat").ids[0] == tokens.BEGIN_ID
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == again.id_to_token(0)


def test_blocks_have_scales_of_their_own():
    weight = torch.randn(130, 300)
    weight[:128, 128:256] *= 1000
    quantized, scales = export.quantize(weight)
    assert scales.shape == (2, 3)
    back = export.dequantize(quantized, scales)
    error = (back - weight).abs()
    assert error[:, :128].max() < weight[:, :128].abs().max() / 16
    assert error[:128, 128:256].max() < weight.abs().max() / 16
    assert (quantized.float().abs().amax() == 448.0).item()


def test_training_goes_on_where_it_was_saved(found, tmp_path):
    one = Training(SHAPE, plan(), found, Together())
    one.step()
    one.save(tmp_path / CHECKPOINT)
    two = Training(SHAPE, plan(), found, Together())
    two.restore(tmp_path / CHECKPOINT)
    one.restore(tmp_path / CHECKPOINT)
    assert (two.steps, two.tokens) == (1, 256)
    assert one.step() == two.step()
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_time_that_is_over_ends_it_with_a_checkpoint(found, tmp_path):
    said = []
    training = Training(SHAPE, plan(minutes=1e-6), found, Together())
    train(training, tmp_path, said.append)
    assert training.steps == 1
    assert load(tmp_path / CHECKPOINT).shape == SHAPE


def test_rates_rise_stay_and_fall():
    it = plan(warmup_steps=10, steady=0.5)
    assert it.speed(0.0, 0) == pytest.approx(0.1)
    assert it.speed(0.3, 50) == 1.0
    assert it.speed(0.75, 50) == pytest.approx(0.5)
    assert it.speed(1.1, 50) == 0.0


def test_windows_begin_as_prompts_do(found):
    windows = Windows(found.train, (0, 0, 0)).draw(32, 20)
    assert windows.shape == (32, 20)
    assert (windows[:, 0] == tokens.BEGIN_ID).all()
    assert torch.equal(windows, Windows(found.train, (0, 0, 0)).draw(32, 20))
    assert not torch.equal(windows, Windows(found.train, (0, 1, 0)).draw(32, 20))
    held = held_out_windows(found.held_out["chat"], 3, 20)
    assert held.shape == (3, 20)
    assert (held[:, 0] == tokens.BEGIN_ID).all()


def test_bytes_of_tokens(found):
    text = "the café — 25 mats"
    ids = found.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens.byte_lengths(found.tokenizer)[ids].sum() == len(text.encode())
    assert found.tokenizer.decode(ids) == text


def test_a_dialogue_is_encoded_as_the_template_writes_it(found):
    jinja2 = pytest.importorskip("jinja2")
    (first,) = tokens._encoded(found.tokenizer, [Document(turns=("on?", "a mat", "and?", "it"))])
    roles = ["user", "assistant"] * 2
    said = [
        {"role": role, "content": text}
        for role, text in zip(roles, ("on?", "a mat", "and?", "it"), strict=True)
    ]
    text = jinja2.Template(tokens.CHAT_TEMPLATE).render(
        messages=said, bos_token=tokens.BEGIN, eos_token=tokens.END
    )
    assert found.tokenizer.encode(text, add_special_tokens=False).ids == first


def test_orthogonal_steps():
    for rows, columns in ((24, 64), (64, 24)):
        found = orthogonal(torch.randn(3, rows, columns))
        values = torch.linalg.svdvals(found.float())
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_an_answer_ends(trained):
    model = trained[0].model
    ids = answer(model, [0, 5, 6], end=-1, most=4)
    assert len(ids) == 4
    assert answer(model, [0, 5, 6], end=ids[2], most=4) == ids[: ids.index(ids[2])]


def test_sizes_of_the_real_one():
    with torch.device("meta"):
        assert 5e6 < sum(p.numel() for p in TinyDeepseek(Shape()).parameters()) < 12e6
