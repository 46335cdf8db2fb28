"""What a model makes of texts: its share of samples without one, guidance, and each on its own."""

import pytest
import torch
from small_latent import TEXTS, batch, decoder, made, source, step, text
from small_system import system as joint

from avdiffusion.diffusion.guide import ClassifierFree
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.systems.condition import Source, Text
from avdiffusion.systems.step import Step

NEAR = {"rtol": 1e-4, "atol": 1e-4}


def said(numbers):
    return {"text": [TEXTS[i % len(TEXTS)] for i in numbers]}


def test_a_sample_whose_number_is_below_the_share_is_told_nothing():
    model, given = text(drop=0.3).model, {"text": TEXTS}
    u = torch.tensor([0.1, 0.3, 0.29999, 0.9], dtype=torch.float64)
    own, mixed = model.condition(given), model.condition(given, u=u)
    assert own.keys() == mixed.keys() == {"context", "context_mask"}
    nothing = model.conditioner.empty
    for row, dropped in enumerate([True, False, True, False]):
        expected = nothing if dropped else own["context"][row]
        assert torch.equal(mixed["context"][row], expected)
        expected = torch.ones(20).bool() if dropped else own["context_mask"][row]
        assert torch.equal(mixed["context_mask"][row], expected)
    assert int(own["context_mask"][0].sum()) == len(TEXTS[0]) + 1
    # in sampling and validation, where no numbers are drawn, all are told
    assert torch.equal(model.condition(given, u=None)["context"], own["context"])
    everyone = text(drop=0.0).model
    assert torch.equal(
        everyone.condition(given, u=torch.zeros(4))["context"], everyone.condition(given)["context"]
    )


def test_every_parameter_has_a_gradient_whether_texts_are_dropped_or_not():
    """Several processes wait for each that can have one."""
    for drop in (0.0, 0.5):
        system = text(drop=drop).train()
        system.training_loss(batch(8))["loss"].backward()
        parameters = dict(system.model.named_parameters())
        without = {name for name, p in parameters.items() if p.requires_grad and p.grad is None}
        assert without == set()
        assert parameters["conditioner.empty"].requires_grad == (drop > 0)


def test_an_embedding_stands_for_a_text():
    """As long as it is; its nothing is as long."""
    model = text(drop=0.5).model
    given = {"embedding": torch.randn(2, 7, 8)}
    cond = model.condition(given, u=torch.tensor([0.0, 0.9]))
    assert cond.keys() == {"context"}
    assert torch.equal(cond["context"][0], model.conditioner.empty[:7])
    assert torch.equal(cond["context"][1], given["embedding"][1])


@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_a_share_that_is_none_is_named(drop):
    with pytest.raises(ValueError, match=f"drop={drop} is not a share"):
        Source(drop=drop)
    with pytest.raises(ValueError, match=f"drop={drop} is not a share"):
        Text(encoder=text().model.conditioner.encoder, drop=drop)


def dropped(system, count, position=0, parts=1):
    """Which samples of a batch are told nothing in training."""
    seen = []

    def look(module, args, kwargs):
        nothing = system.model.conditioner.empty
        seen.extend(torch.equal(row, nothing) for row in kwargs["context"])

    hook = system.model.net.register_forward_pre_hook(look, with_kwargs=True)
    size = count // parts
    for k in range(parts):
        system.training_loss(batch(size, position + k * size))
    hook.remove()
    return seen


def test_who_is_told_nothing_depends_on_the_position_alone():
    """Not on the micro-batch, so neither on accumulation nor on the number of devices."""
    whole = dropped(text(drop=0.4), 16)
    assert 2 < sum(whole) < 12
    assert dropped(text(drop=0.4), 16, parts=4) == whole
    assert dropped(text(drop=0.4), 8, position=8) == whole[8:]
    assert dropped(text(drop=0.4), 16, position=16) != whole
    assert dropped(text(drop=0.4, seed=1), 16) != whole
    counted = dropped(text(drop=0.1), 64) + dropped(text(drop=0.1), 64, position=64)
    assert 3 <= sum(counted) <= 25  # of a mean of 12.8


def test_who_is_told_nothing_does_not_depend_on_the_time_drawn():
    """Both are numbers of the same position: one stream would drop only times of one end."""
    seen = []

    def look(module, args, kwargs):
        nothing = system.model.conditioner.empty
        rows = zip(kwargs["context"], kwargs["time"], strict=True)
        seen.extend(float(t) for row, t in rows if torch.equal(row, nothing))

    system = text(drop=0.4)
    system.model.net.register_forward_pre_hook(look, with_kwargs=True)
    system.training_loss(batch(64))
    assert min(seen) < 0.25
    assert max(seen) > 0.75


def test_a_text_changes_the_sample_and_other_samples_do_not():
    system = text(decoder(), sampler=DDPM(steps=3, variance="small"))
    whole = system.sample(5, told=said, micro_batch=2)["audio"]
    for asked in ([3], [4, 1], [2, 3]):
        some = system.sample(index=asked, told=said, micro_batch=2)["audio"]
        torch.testing.assert_close(some, whole[asked], **NEAR)
    other = system.sample(index=[3], told=lambda _: {"text": ["thunder"] * 2}, micro_batch=2)
    assert float((other["audio"][0] - whole[3]).abs().max()) > 1e-3
    seeded = system.sample(index=[3], told=said, micro_batch=2, seed=1)["audio"]
    assert float((seeded[0] - whole[3]).abs().max()) > 0.1


def test_guidance_goes_away_from_what_is_made_of_no_text():
    """In one step the sample is the prediction: free + scale (model - free)."""
    system = text(sampler=DDIM(steps=1))

    def guided(scale, **options):
        return made(system, guides=[ClassifierFree(scale=scale)], **options)["audio"]

    model, free = guided(1.0), guided(0.0)
    assert torch.equal(model, made(system)["audio"])
    nothing = system.ema.ema_model.conditioner.empty.detach()
    told = made(system, told=lambda n: {"embedding": nothing.expand(len(n), -1, -1)})["audio"]
    torch.testing.assert_close(free, told, **NEAR)
    assert float((model - free).abs().max()) > 0.01
    torch.testing.assert_close(guided(3.0), free + 3 * (model - free), **NEAR)
    # what is made of no text is asked for at every step, and counted
    calls = [
        next(system.samples([0], told=said, guides=guides, sampler=DDIM(steps=4))).evaluations
        for guides in ([], [ClassifierFree(scale=3.0)], [ClassifierFree(scale=1.0)])
    ]
    assert calls == [4, 8, 4]


def test_guidance_and_precision_of_calls_go_together():
    system = text(decoder())
    guides = [ClassifierFree(scale=2.0)]
    exact = made(system, guides=guides)["audio"]
    half = made(system, guides=guides, step=Step(precision="bf16-mixed"))["audio"]
    assert 0 < float((half - exact).square().mean().sqrt()) < 0.1 * float(exact.std())


def test_a_source_that_is_dropped_is_told_apart_from_a_black_one():
    conditioner = Source(drop=0.5)
    given = {"source": torch.zeros(2, 3, 2, 4, 4)}
    told = conditioner(given, lambda clips: clips)
    assert told["concat"].shape == (2, 4, 2, 4, 4)
    assert bool((told["concat"][:, 3] == 1).all())
    nothing = conditioner.null(told)["concat"]
    assert not nothing.any()
    assert nothing.shape == told["concat"].shape
    assert Source()(given, lambda clips: clips)["concat"].shape == (2, 3, 2, 4, 4)


def test_what_a_model_is_told_is_asked_for_and_refused():
    with pytest.raises(ValueError, match='give it one, text="a dog barking"'):
        text().sample(2)
    with pytest.raises(ValueError, match="makes clips of nothing: leave out text="):
        joint().sample(2, told=said)
    with pytest.raises(ValueError, match=r"makes clips of others, of source"):
        source().sample(2, told=said)
    with pytest.raises(ValueError, match=r"no 'text', which this model is conditioned on"):
        text().sample(2, told=lambda _: {"texts": TEXTS[:2]})
    with pytest.raises(ValueError, match="leaves out a condition, and this model has none"):
        made(text(drop=0.0), guides=[ClassifierFree()])


def test_training_learns_what_a_text_says():
    """Two texts, two constant sounds: the loss with the right one is below the wrong one's."""
    system = text(drop=0.1)
    loud = torch.tensor([0.8, -0.8]).view(2, 1, 1).expand(2, 1, 64)

    def given(position):
        return {
            "audio": loud.repeat(4, 1, 1),
            "text": TEXTS[:2] * 4,
            "position": list(range(position, position + 8)),
        }

    optimizer = torch.optim.AdamW(system.model.parameters(), lr=1e-2, weight_decay=0.0)
    for k in range(60):
        optimizer.zero_grad()
        system.training_loss(given(8 * k))["loss"].backward()
        optimizer.step()
    system.model.conditioner.drop = 0.0
    right = system.training_loss(given(10_000))["loss"]
    wrong = system.training_loss(given(10_000) | {"text": TEXTS[1::-1] * 4})["loss"]
    assert float(right.detach()) < 0.5 * float(wrong.detach())


def test_a_step_changes_the_text_encoder():
    system = text()
    before = {k: v.clone() for k, v in system.model.conditioner.encoder.state_dict().items()}
    step(system)
    after = system.model.conditioner.encoder.state_dict()
    assert all(not torch.equal(after[k], before[k]) for k in before)
