"""Optimisers: what they do to weights, what they remember, and that a checkpoint has all of it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training.config.optim import CAN_BE_CLIPPED, CLIP_THEMSELVES, OptimizerSettings
from training.errors import RunError, SettingError
from training.files import write_tensors
from training.optim import low_bit
from training.optim.adamw_bf16 import AdamWBF16, round_into
from training.optim.averages import EMA, averaged, ema_decay
from training.optim.backward import OptimizerInBackward, update_rms
from training.optim.build import build_optimizer
from training.optim.schedule import set_learning_rate
from training.optim.state import load_optimizer_tensors, optimizer_tensors
from training.optim.step import clip_gradients, step_optimizer

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = [
    *((name, dtype) for name in ("adamw_bf16", "torch-adamw", "optimi-lion", "optimi-adamw") for dtype in (FP32, BF16)),
    *((f"optimi-{name}", BF16) for name in ("stableadamw", "adan", "radam", "ranger", "sgd")),
    *((name, FP32) for name in ("prodigy", "adamw_schedulefree", "adafactor")),
]
ARGUMENTS = {
    "optimi-adan": "kahan_sum=true",
    "optimi-sgd": "momentum=0.9",
    "optimi-ranger": "k=3",  # looks ahead at steps 3, 6 and 9
    "torch-adamw": "amsgrad=true",
    "prodigy": "d0=1e-4",  # which it raises from step 3 on
}


def settings(name, **more):
    chosen = {"optimizer": name, "learning_rate": 1 if name == "prodigy" else 1e-2, "weight_decay": 0.1}
    return OptimizerSettings(**{**chosen, "optimizer_config": ARGUMENTS.get(name, ""), **more})


def weights(dtype=FP32, seed=0):
    """A matrix, which torchao and adafactor treat otherwise than the vector."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": nn.Parameter(torch.randn(8, 12, generator=generator).to(dtype)),
        "layer.bias": nn.Parameter(torch.randn(5, generator=generator).to(dtype)),
    }


def groups(weights, chosen):
    """A group each, as with LoRA+; prodigy has one learning rate."""
    ratio = 1 if chosen.optimizer == "prodigy" else 2
    return [
        {"params": [weight], "names": [name], "lr": chosen.learning_rate * ratio**n}
        for n, (name, weight) in enumerate(weights.items())
    ]


def loss(weights, step):
    """A quadratic with another noise in every step."""
    generator = torch.Generator().manual_seed(step)
    noise = (torch.randn(weight.shape, generator=generator).to(weight.dtype) for weight in weights.values())
    return sum(((w - 0.3) ** 2 / 2 + n * w).float().sum() for w, n in zip(weights.values(), noise, strict=True))


def train(optimizer, weights, steps):
    for step in steps:
        set_learning_rate(optimizer, 1 / (1 + step))
        loss(weights, step).backward()
        if isinstance(optimizer, OptimizerInBackward):
            optimizer.take_norm()
        else:
            step_optimizer(optimizer, torch.tensor(True))
            optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a.keys() | b.keys())


def copies(weights):
    return {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}


def through_a_file(optimizer, folder):
    tensors, scalars = optimizer_tensors(optimizer)
    write_tensors(folder / "optimizer.safetensors", tensors)
    return load_file(folder / "optimizer.safetensors"), json.loads(json.dumps(scalars))


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_checkpoint_goes_on_bit_for_bit(name, dtype, tmp_path):
    chosen = settings(name)
    through, before = weights(dtype), weights(dtype)
    optimizer = build_optimizer(groups(through, chosen), chosen, seed=1)
    train(optimizer, through, range(10))

    optimizer_before = build_optimizer(groups(before, chosen), chosen, seed=1)
    train(optimizer_before, before, range(5))
    after = copies(before)
    resumed = build_optimizer(groups(after, chosen), chosen, seed=1)
    load_optimizer_tensors(resumed, *through_a_file(optimizer_before, tmp_path))
    train(resumed, after, range(5, 10))
    assert same(after, through)
    assert not same(after, before)
    assert same(optimizer_tensors(resumed)[0], optimizer_tensors(optimizer)[0])
    assert optimizer_tensors(resumed)[1] == optimizer_tensors(optimizer)[1]

    forgetful = copies(before)
    train(build_optimizer(groups(forgetful, chosen), chosen, seed=1), forgetful, range(5, 10))
    assert not same(forgetful, through)


def test_another_optimizer_or_other_weights_are_refused(tmp_path):
    made = weights()
    optimizer = build_optimizer(groups(made, settings("adamw_bf16")), settings("adamw_bf16"), seed=0)
    train(optimizer, made, range(1))
    saved = through_a_file(optimizer, tmp_path)
    with pytest.raises(RunError, match="optimiser is adamw_bf16 and this run's is torch-adamw"):
        load_optimizer_tensors(
            build_optimizer(groups(made, settings("torch-adamw")), settings("torch-adamw"), 0), *saved
        )
    fewer = {"layer.bias": weights()["layer.bias"]}
    other = build_optimizer(groups(fewer, settings("adamw_bf16")), settings("adamw_bf16"), seed=0)
    with pytest.raises(RunError, match=r"not trained here, such as layer\.weight"):
        load_optimizer_tensors(other, *saved)


def test_states_on_the_host_stay_there_and_others_go_to_the_weights():
    def optimizer():
        weight = nn.Parameter(torch.ones(3, device="meta"))
        return build_optimizer(
            groups({"weight": weight}, settings("adamw_bf16")), settings("adamw_bf16"), seed=0
        ), weight

    before, weight = optimizer()
    before.state[weight] = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3, device="meta")}
    tensors, scalars = optimizer_tensors(before)
    after, weight = optimizer()
    load_optimizer_tensors(after, {key: torch.zeros(value.shape) for key, value in tensors.items()}, scalars)
    assert {kind: value.device.type for kind, value in after.state[weight].items()} == {
        "step": "cpu",
        "exp_avg": "meta",
    }


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(name, dtype, steps_before):
    made = weights(dtype)
    chosen = settings(name)
    optimizer = build_optimizer(groups(made, chosen), chosen, seed=1)
    train(optimizer, made, range(steps_before))
    weights_before = copies(made)
    state_before = {key: value.clone() for key, value in optimizer_tensors(optimizer)[0].items()}
    for wrong in (math.nan, math.inf):
        for weight in made.values():
            weight.grad = torch.ones_like(weight)
        made["layer.weight"].grad[0, 0] = wrong
        norm = clip_gradients(list(made.values()), 1.0, "norm")
        step_optimizer(optimizer, torch.isfinite(norm))
    assert same(made, weights_before)
    state = optimizer_tensors(optimizer)[0]
    assert same({key: state[key] for key in state_before}, state_before)
    assert all(not value.any() for key, value in state.items() if key not in state_before)  # made, and still empty
    optimizer.zero_grad()
    train(optimizer, made, range(5, 7))
    assert all(weight.isfinite().all() for weight in made.values())
    assert not same(made, weights_before)


def bf16_adamw(weight, **more):
    return AdamWBF16([{"params": [weight], "names": ["weight"]}], **more)


def test_rounding_by_chance_keeps_the_mean_and_what_is_exact():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1 + 0.3 * 2**-7, -3 - 0.9 * 2**-6, 1.5, 0.0, -(2.0**-130)])
    many = values.expand(20_000, -1).contiguous()
    rounded = torch.empty_like(many, dtype=BF16)
    round_into(rounded, many, generator)
    assert torch.equal(rounded[:, 2:].float(), many[:, 2:])
    assert torch.allclose(rounded.float().mean(0), values, rtol=1e-4)  # rounding down alone is wrong by 2e-3
    assert rounded[:, 0].unique().tolist() == [1, 1 + 2**-7]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_momentum_of_a_constant_gradient_is_that_gradient(dtype):
    weight = nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = bf16_adamw(weight, lr=1e-3, weight_decay=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.float().mean().item() == pytest.approx(-1e-3, rel=1e-2)  # a whole step at once: bias is corrected
    for _ in range(150):
        optimizer.step()
    state = optimizer.state[weight]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (BF16, BF16)
    assert state["exp_avg"].float().mean().item() == pytest.approx(1, abs=3e-3)
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(1 - 0.999**151, rel=1e-2)
    assert weight.float().mean().item() == pytest.approx(-0.151, rel=1e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_weight_decay_is_exact_on_average(dtype):
    weight = nn.Parameter(torch.full((50_000,), 1.0, dtype=dtype))
    optimizer = bf16_adamw(weight, lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert 1 - weight.double().mean().item() == pytest.approx(1 - (1 - 1e-4) ** 20, rel=0.05)


def noisy_quadratic(weight, make, steps=500):
    """Where ½‖w − 0.3‖² with noisy gradients comes to; the noise is the same for every optimiser."""
    optimizer = make(weight)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad = (weight.detach().float() - 0.3 + noise).to(weight.dtype)
        optimizer.step()
    return weight.detach().float()


def test_bf16_goes_the_way_of_fp32_where_rounding_to_the_nearest_stands_still():
    start = torch.randn(2000, generator=torch.Generator().manual_seed(3)).to(BF16)
    arguments = {"lr": 3e-4, "weight_decay": 0.01}

    def torch_adamw(weight):
        return torch.optim.AdamW([weight], **arguments)

    def ours(weight):
        return bf16_adamw(weight, **arguments)

    exact = noisy_quadratic(nn.Parameter(start.float()), torch_adamw)
    travelled = (exact - start.float()).square().mean().sqrt()

    def off(found):
        return ((found - exact).square().mean().sqrt() / travelled).item()

    chance, nearest = (
        noisy_quadratic(nn.Parameter(start.clone()), ours),
        noisy_quadratic(nn.Parameter(start.clone()), torch_adamw),
    )
    assert off(noisy_quadratic(nn.Parameter(start.float()), ours)) < 0.02  # 0.006: only its states are bf16
    assert off(chance) < 0.3  # 0.22, which is noise without a direction
    assert off(nearest) > 0.9
    assert (chance - exact).mean().abs() < 0.1 * (nearest - exact).mean().abs()


def test_noise_is_of_the_seed_the_step_and_the_name():
    def one_step(seed=0, name="weight", steps=1):
        weight = nn.Parameter(torch.ones(256, dtype=BF16))
        optimizer = AdamWBF16([{"params": [weight], "names": [name]}], lr=1e-3, seed=seed)
        for _ in range(steps):
            before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return before != weight

    first = one_step()
    assert torch.equal(first, one_step())
    for other in (one_step(seed=1), one_step(name="bias"), one_step(steps=2)):
        assert not torch.equal(first, other)


def test_weights_that_adamw_bf16_cannot_train_are_refused():
    with pytest.raises(SettingError, match=r"weight is torch\.float16"):
        bf16_adamw(nn.Parameter(torch.ones(2, dtype=torch.float16)))


def test_gradients_are_clipped_by_their_norm_or_each():
    made = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]

    def clipped(largest, method):
        made[0].grad, made[1].grad = torch.tensor([3.0, 0.5]), torch.tensor([-4.0])
        return clip_gradients(made, largest, method).item(), torch.cat([weight.grad for weight in made])

    norm = math.sqrt(9 + 0.25 + 16)
    for largest, method, expected in (
        (1.0, "norm", [3 / norm, 0.5 / norm, -4 / norm]),
        (100.0, "norm", [3, 0.5, -4]),
        (2.0, "value", [2, 0.5, -2]),
        (0.0, "norm", [3, 0.5, -4]),
        (0.0, "value", [3, 0.5, -4]),
    ):
        told, gradients = clipped(largest, method)
        assert told == pytest.approx(norm)
        assert torch.allclose(gradients, torch.tensor(expected), atol=1e-5)


def in_backward(name, made, **more):
    chosen = settings(name, fused_backward=True, **{"max_grad_norm": 0, **more})
    return OptimizerInBackward(groups(made, chosen), chosen, seed=1)


@pytest.mark.parametrize(("name", "dtype"), [kind for kind in KINDS if kind[0] != "prodigy"])
def test_in_the_backward_pass_weights_become_the_same(name, dtype, tmp_path):
    plain, fused = weights(dtype), weights(dtype)
    train(build_optimizer(groups(plain, settings(name)), settings(name), seed=1), plain, range(6))
    optimizer = in_backward(name, fused)
    train(optimizer, fused, range(3))
    resumed = copies(fused)
    loaded = in_backward(name, resumed)
    load_optimizer_tensors(loaded, *through_a_file(optimizer, tmp_path))
    for each, made in ((optimizer, fused), (loaded, resumed)):
        train(each, made, range(3, 6))
        assert same(made, plain)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))


def test_in_the_backward_pass_one_gradient_is_alive_at_a_time():
    model = chain()
    made = dict(model.named_parameters())
    alive = []

    def count(_):
        alive.append(sum(weight.grad is not None for weight in made.values()))

    for weight in made.values():
        weight.register_post_accumulate_grad_hook(count)
    optimizer = in_backward("torch-adamw", made)
    model(torch.ones(2, 6)).sum().backward()
    assert alive == [1] * len(made)
    assert all(weight.grad is None for weight in made.values())
    optimizer.remove()
    model(torch.ones(2, 6)).sum().backward()
    assert all(weight.grad is not None for weight in made.values())


@pytest.mark.parametrize("name", ["torch-adamw", "adamw_bf16", "optimi-lion"])
@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 1, "grad_clip_method": "update"}])
def test_in_the_backward_pass_what_is_not_finite_is_noticed_and_not_taken(name, clipping):
    made = weights()
    optimizer = in_backward(name, made, **clipping)
    train(optimizer, made, range(2))
    before, state = copies(made), {key: value.clone() for key, value in optimizer_tensors(optimizer)[0].items()}
    (made["layer.weight"].sum() * math.nan + made["layer.bias"].sum() * 2).backward()
    assert not optimizer.take_norm().isfinite()
    assert torch.equal(made["layer.weight"], before["layer.weight"])
    assert not torch.equal(made["layer.bias"], before["layer.bias"])
    after = optimizer_tensors(optimizer)[0]
    assert all(torch.equal(after[key], value) for key, value in state.items() if key.endswith("layer.weight"))
    (made["layer.weight"].sum() * 3).backward()
    assert optimizer.take_norm().item() == pytest.approx(3 * math.sqrt(8 * 12))
    assert made["layer.weight"].isfinite().all()


@pytest.mark.parametrize("name", ["torch-adamw", "adamw_bf16"])
def test_updates_are_clipped_where_gradients_jump(name):
    def jump(by, **clipping):
        weight = nn.Parameter(torch.zeros(64, 64))
        chosen = settings(name, fused_backward=True, weight_decay=0, **{"max_grad_norm": 0, **clipping})
        optimizer = OptimizerInBackward([{"params": [weight], "names": ["weight"], "lr": 0.1}], chosen, seed=1)
        for step in range(20):
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            (weight * noise * 0.5).sum().backward()
        before = weight.detach().clone()
        (weight * by).sum().backward()
        assert isinstance(optimizer.param_groups[0]["lr"], float)
        return (weight.detach() - before).square().mean().sqrt().item() / 0.1

    clipping = {"max_grad_norm": 1, "grad_clip_method": "update"}
    # Of the second moment, debiased, the jump is a part of 0.001 / (1 − 0.999²¹), and the rest is nothing beside it.
    rms = math.sqrt((1 - 0.999**21) / 0.001)
    assert jump(100.0) == pytest.approx(rms * 0.1 / (1 - 0.9**21), rel=0.03)
    assert jump(100.0, **clipping) == pytest.approx(jump(100.0) / rms, rel=0.03)
    assert jump(0.1, **clipping) == pytest.approx(jump(0.1), rel=1e-6)  # and nothing where they do not


def test_every_optimizer_that_says_so_can_be_clipped():
    for name in (*CAN_BE_CLIPPED, *CLIP_THEMSELVES):
        if name.startswith(("ao-", "bnb-")):
            continue  # torchao stands in the parity tests; bitsandbytes is not here
        made = weights()
        optimizer = in_backward(name, made, max_grad_norm=1, grad_clip_method="update")
        train(optimizer, made, range(3))
        assert optimizer.narrows == (name in CAN_BE_CLIPPED)
        if optimizer.narrows:
            rms = update_rms(torch.full((8, 12), 1e3), optimizer.optimizers[0])
            assert rms.item() == pytest.approx(math.sqrt((1 - 0.999**4) / 0.001), rel=0.02)


@pytest.mark.parametrize("name", ["ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8"])
@pytest.mark.parametrize("shape", [(24, 512), (33, 300)])  # of blocks that share a scale, and of none
def test_a_weight_takes_its_step_in_slices_as_in_one(name, shape, monkeypatch):
    def steps(largest):
        monkeypatch.setattr(low_bit, "SLICE", largest)
        weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16))
        chosen = settings(name)
        optimizer = build_optimizer([{"params": [weight], "names": ["weight"], "lr": 1e-2}], chosen, seed=1)
        taken = []
        step = type(optimizer).__mro__[1].step
        monkeypatch.setattr(type(optimizer).__mro__[1], "step", lambda self: (taken.append(1), step(self)))
        for number in range(3):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(BF16)
            optimizer.step()
        rms = update_rms(weight.grad, optimizer)
        monkeypatch.undo()
        return len(taken), {"weight": weight.detach(), **optimizer_tensors(optimizer)[0]}, rms

    parts, sliced, rms = steps(2048)
    once, whole, expected = steps(2**30)
    assert (parts, once) == (3 * math.ceil(math.prod(shape) / 2048), 3)
    assert same(sliced, whole)
    assert rms.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_8_bits_are_torchaos(signed):
    from torchao.optim.quant_utils import quantize_8bit_with_qmap
    from torchao.optim.subclass_8bit import OptimState8bit

    limits = low_bit.code_thresholds(tuple(OptimState8bit.zeros((256,), signed).qmap.tolist()))
    nearby = [(limits.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-40, 41)]
    numbers = torch.cat([*nearby, torch.linspace(-1, 1, 10_001), torch.randn(10_000).clamp(-1, 1) * 1e-5])
    state = OptimState8bit.zeros(numbers.shape, signed, block_size=numbers.numel())
    expected = quantize_8bit_with_qmap(numbers, state.qmap)
    low_bit.write_8bit(numbers, state)
    assert state.scale.tolist() == [1.0]
    assert torch.equal(state.codes, expected)

    numbers = torch.randn(8, 256) * 1e-3
    written, copied = (OptimState8bit.zeros(numbers.shape, signed) for _ in range(2))
    low_bit.write_8bit(numbers, written)
    copied.copy_(numbers)
    assert torch.equal(written.codes, copied.codes)
    assert torch.equal(written.scale, copied.scale)


def test_states_of_few_bits_are_not_compared():
    with pytest.raises(SettingError, match="ao-adamw8bit refuses: amsgrad needs states"):
        build_optimizer(
            groups(weights(), settings("torch-adamw")), settings("ao-adamw8bit", optimizer_config="amsgrad=true"), 1
        )


def test_value_clipping_in_the_backward_pass():
    made = {"weight": nn.Parameter(torch.zeros(2))}
    optimizer = in_backward("optimi-sgd", made, max_grad_norm=0.5, grad_clip_method="value", weight_decay=0)
    set_learning_rate(optimizer, 1)
    (made["weight"] * torch.tensor([3.0, 0.25])).sum().backward()
    assert torch.allclose(made["weight"], torch.tensor([-0.5e-2, -0.25e-2]))


def test_ema_decays_by_hand():
    plain = OptimizerSettings(use_ema=True)
    assert [ema_decay(step, plain) for step in (1, 2, 11)] == [0, 2 / 11, 11 / 20]
    assert ema_decay(10_000, plain) == 0.995
    assert ema_decay(10_000, OptimizerSettings(ema_update_interval=10)) == 0.995**10
    late = OptimizerSettings(ema_warmup_steps=3)
    assert [ema_decay(step, late) for step in range(1, 6)] == [0, 0, 0, 0.995, 0.995]


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_ema_is_fp32_and_weights_come_back_bit_for_bit(device):
    weight = nn.Parameter(torch.ones(3, dtype=BF16))
    ema = EMA({"weight": weight}, OptimizerSettings(ema_device=device, ema_warmup_steps=1))
    ema.update(1)
    with torch.no_grad():
        weight.fill_(2)
    for step in (2, 3):
        ema.update(step)  # each by less than bf16 can tell
    averages = ema.state()
    assert averages["weight"].tolist() == pytest.approx([2 - 0.995**2] * 3)

    def validate():
        with ema.in_place():
            assert weight.tolist() == torch.full((3,), 2 - 0.995**2).to(BF16).tolist()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate()
    assert weight.tolist() == [2, 2, 2]

    loaded = EMA({"weight": weight}, OptimizerSettings(ema_device=device, ema_warmup_steps=1))
    loaded.load({"weight": averages["weight"].clone()})
    for each in (ema, loaded):
        each.update(4)
    assert torch.equal(ema.state()["weight"], loaded.state()["weight"])
    with pytest.raises(RunError, match="of other weights: bias"):
        loaded.load({"weight": averages["weight"], "bias": torch.ones(1)})


def test_ema_takes_every_kth_step():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA({"weight": weight}, OptimizerSettings(ema_update_interval=3, ema_decay=0.9, ema_warmup_steps=1))
    with torch.no_grad():
        weight.fill_(1)
    for step, expected in ((2, 0), (3, 1 - 0.9**3), (4, 1 - 0.9**3), (6, 1 - 0.9**6)):
        ema.update(step)
        assert ema.state()["weight"].item() == pytest.approx(expected)


def test_schedule_free_weights_are_averaged_and_come_back_bit_for_bit():
    made, chosen = weights(), settings("adamw_schedulefree", weight_decay=0)
    optimizer = build_optimizer(groups(made, chosen), chosen, seed=0)
    train(optimizer, made, range(30))
    before = copies(made)

    def validate():
        with averaged(optimizer):
            for name, weight in made.items():  # those trained are y = 0.1·z + 0.9·x, and x is the average
                z = optimizer.state[weight]["z"]
                assert torch.allclose(0.1 * z + 0.9 * weight, before[name], atol=1e-6)
                assert not torch.equal(weight, before[name])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate()
    assert same(made, before)
    train(optimizer, made, range(30, 31))  # it is training again
    assert not same(made, before)

    plain = build_optimizer(groups(made, settings("torch-adamw")), settings("torch-adamw"), seed=0)
    before = copies(made)
    with averaged(plain):
        assert same(made, before)
