"""
Custom training loops: the declared coefficient arrives in each. They call nothing of ours unless a test says so.

Every loop runs on a balanced and on an ordinary model. It gets the balancer only to announce a step, and `None` for
the ordinary model.
"""

import contextlib
import math

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from checks import assert_same
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins import MixedPrecision as LightningPrecision
from measuring import (
    COEF,
    TOLERANCE,
    Watch,
    assert_declared,
    batches,
    charge,
    coefficients,
    loaded,
    ordinary,
    priced,
    received,
    tokens_of,
)
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.optim import SGD, AdamW

import hf_phibalance as phb


pytestmark = pytest.mark.slow


DATA = batches(6)
# settings for measuring a run in low precision
LOW = {
    "bf16-mixed": {"autocast": torch.bfloat16, "tolerance": 2e-2, "rest": 0.2},
    "16-mixed": {"autocast": torch.float16, "tolerance": 1e-2},
}


def both(loop, family="mixtral", by_itself=True, **fields):
    """Runs `loop(model, watch, balancer)` on a balanced and on an ordinary model, with the same random numbers."""
    watches = []
    for balanced in (True, False):
        model = ordinary(family, **fields).train()
        if balanced:
            priced(phb.patch(model, {"coef": COEF}))
        watch = Watch(model, by_itself)
        torch.manual_seed(5)
        try:
            loop(model, watch, watch.balancer)
        finally:
            watches.append(watch.close())
    return watches


def sgd(model):
    return SGD(model.parameters(), lr=0.0)


def one_step(model, optimizer, *losses):
    sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------- the measure itself


def test_the_measure_is_right_without_us():
    """For an ordinary model with the price term in its loss, times a factor, the measure returns that factor."""
    prices = {
        f"model.layers.{i}.mlp.gate": torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(2)
    }
    plain = Watch(ordinary().train())
    one_step(plain.model, sgd(plain.model), plain.model(**DATA[0]).loss)
    task = plain.close().steps[0]

    def measured(factor, mask, prices_paid=prices):
        model, batch = ordinary().train(), DATA[0]
        output = model(**batch, output_router_logits=True, router_aux_loss_coef=0.0)
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        keep = mask.bool().flatten()
        for logits, price in zip(output.router_logits, prices_paid.values()):
            loss = loss + factor * COEF * (logits.softmax(-1)[keep] @ price).mean()
        loss.backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        right = {name: COEF * value for name, value in charge(ordinary(), task, prices).items()}
        return received(got, task.gradients, right)

    mask = DATA[0]["attention_mask"]
    for factor in (0.0, 0.5, 1.0):
        ratio, rest = measured(factor, mask)
        assert abs(ratio - factor) < 1e-4 and rest < 1e-4
    assert measured(1.0, torch.ones_like(mask))[1] > 5 * TOLERANCE  # padding would count
    assert measured(1.0, mask, {name: price.flip(0) for name, price in prices.items()})[1] > 5 * TOLERANCE


def test_an_unbalanced_loop_is_found_to_receive_nothing():
    """With an ordinary model instead of the balanced one, the measured ratio is 0."""
    balanced, plain = both(lambda model, watch, _: one_step(model, sgd(model), model(**DATA[0]).loss))
    balanced.steps[0].gradients = plain.steps[0].gradients
    ((ratio, rest),) = coefficients(balanced, plain)
    assert ratio == rest == 0.0


# ---------------------------------------------------------------------- plain torch


OPTIMIZERS = {
    "sgd": sgd,
    "adamw loop": lambda model: AdamW(model.parameters(), lr=0.0, foreach=False),
    "adamw foreach": lambda model: AdamW(model.parameters(), lr=0.0, foreach=True),
    "adamw fused": lambda model: AdamW(model.parameters(), lr=0.0, fused=True),
    "adamw capturable": lambda model: AdamW(model.parameters(), lr=0.0, capturable=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.0),
}


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [*(("mixtral", name) for name in OPTIMIZERS), ("qwen3_moe", "sgd"), ("deepseek_v3", "adamw fused")],
)
def test_a_plain_loop_needs_no_call(family, optimizer):
    if optimizer == "adamw capturable" and not torch.cuda.is_available():
        pytest.skip("torch has no capturable AdamW on the CPU")

    def loop(model, watch, _):
        own = OPTIMIZERS[optimizer](model)
        for batch in DATA[:3]:
            one_step(model, own, model(**batch).loss)

    assert_declared(*both(loop, family), lambda: ordinary(family))


def test_step_of_the_balancer_may_be_called_as_well():
    """`balancer.step()` once or twice after the optimizer's step changes nothing."""

    def loop(model, watch, balancer):
        optimizer = sgd(model)
        for batch in DATA[:2]:
            one_step(model, optimizer, model(**batch).loss)
            for _ in range(2):
                if balancer is not None:
                    balancer.step()

    assert_declared(*both(loop))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_bf16_autocast(family):
    def loop(model, watch, _):
        optimizer = sgd(model)
        for batch in DATA[:2]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            one_step(model, optimizer, loss)

    assert_declared(*both(loop, family), lambda: ordinary(family), **LOW["bf16-mixed"])


# ---------------------------------------------------------------------- gradient accumulation


def accumulated(announce, set_to_none=True):
    def loop(model, watch, balancer):
        optimizer = sgd(model)
        for step in (DATA[:3], DATA[3:5]):  # the second is a remainder
            if balancer is not None and announce is not None:
                balancer.begin_step(announce(step))
            for batch in step:
                (model(**batch).loss / len(step)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    return loop


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_announced_by_batches_is_exact_by_tokens(family, set_to_none):
    found = both(accumulated(lambda step: step, set_to_none), family)
    assert_declared(*found, lambda: ordinary(family))


def test_accumulation_announced_by_number_gives_each_backward_its_part():
    assert_declared(*both(accumulated(len)), evenly=True)


def test_accumulation_that_was_not_announced_is_refused():
    with pytest.raises(RuntimeError, match="begin_step"):
        both(accumulated(None))


def test_each_announced_batch_may_have_several_forwards():
    """An announced batch is split into two forwards. Each token still counts once."""

    def loop(model, watch, balancer):
        optimizer = sgd(model)
        if balancer is not None:
            balancer.begin_step(DATA[:2])
        for batch in DATA[:2]:
            halves = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
            sum(model(**half).loss / 4 for half in halves).backward()
        optimizer.step()

    assert_declared(*both(loop))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_gradient_checkpointing(reentrant, together):
    """The backward recomputes forwards: of announced micro-batches, or of two forwards in one micro-batch."""

    def loop(model, watch, balancer):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if together:
            one_step(model, sgd(model), *(model(**batch).loss for batch in DATA[:2]))
        else:
            accumulated(lambda step: step)(model, watch, balancer)

    family = "deepseek_v3" if together else "qwen3_moe"
    assert_declared(*both(loop, family), lambda: ordinary(family))


# ---------------------------------------------------------------------- several forwards, several backwards


def score(model, batch):
    logs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    return logs.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1).mul(batch["attention_mask"][:, 1:]).sum(-1)


def pairs(model, watch, _):
    """Reward pairs, or DPO without a trainer."""
    optimizer = sgd(model)
    for chosen, rejected in (DATA[:2], DATA[2:4]):
        one_step(model, optimizer, -nn.functional.logsigmoid(score(model, chosen) - score(model, rejected)).mean())


def r_drop(model, watch, _):
    """Two forwards of the same batch, with different dropout."""
    optimizer = sgd(model)
    for batch in DATA[:2]:
        one, two = model(**batch), model(**batch)
        assert not torch.equal(one.logits, two.logits)
        distance = nn.functional.kl_div(one.logits.log_softmax(-1), two.logits.softmax(-1), reduction="batchmean")
        one_step(model, optimizer, one.loss, two.loss, distance)


def dropped(model, watch, _):
    """A forward whose graph is freed before the backward is not part of the step."""
    model(**DATA[1])
    watch.forget()
    one_step(model, sgd(model), model(**DATA[0]).loss)


def looked_at(model, watch, _):
    """Between forward and backward: a forward without gradients in train mode, as for a metric, and a generation."""
    loss = model(**DATA[0]).loss
    with torch.no_grad():
        model(**DATA[1])
    model.generate(DATA[2]["input_ids"][1:], max_new_tokens=3, do_sample=False)
    one_step(model, sgd(model), loss)


def backbone_alone(model, watch, _):
    """A custom head on the hidden states. The language model's head is never called."""
    head = nn.Linear(model.config.hidden_size, 1)
    optimizer = SGD([*model.parameters(), *head.parameters()], lr=0.0)
    for batch in DATA[:2]:
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        one_step(model, optimizer, head(hidden).square().mean())


def retained(model, watch, _):
    """Two backwards through one forward: each router adds its gradient once."""
    optimizer, loss = sgd(model), model(**DATA[0]).loss
    loss.backward(retain_graph=True)
    one_step(model, optimizer, loss)


def projected(model, watch, _):
    """As in PCGrad: takes the gradients of two tasks from one forward separately and adds them."""
    optimizer, output = sgd(model), model(**DATA[0])
    parameters = list(model.parameters())
    first = torch.autograd.grad(output.loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(output.logits.square().mean(), parameters, allow_unused=True)
    for parameter, one, two in zip(parameters, first, second):
        parts = [gradient for gradient in (one, two) if gradient is not None]
        parameter.grad = sum(parts) if parts else None
    optimizer.step()


def penalised(model, watch, _):
    """A gradient penalty: the backward with `create_graph` is the task's only, the next one adds the prices."""
    model.set_attn_implementation("eager")  # other implementations have no second derivative
    optimizer = sgd(model)
    for batch in DATA[:2]:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        one_step(model, optimizer, loss, gradient.square().sum())


LOOPS = {
    loop.__name__: loop for loop in (pairs, r_drop, dropped, looked_at, backbone_alone, retained, projected, penalised)
}


def mask_of_embeddings(inputs):
    return inputs["attention_mask"].bool()


@pytest.mark.parametrize("loop", LOOPS)
def test_forwards_of_one_backward_share_the_coefficient(loop):
    fields = {"attention_dropout": 0.3} if loop == "r_drop" else {}
    found = both(LOOPS[loop], **fields)
    assert_declared(*found, lambda: ordinary(**fields), counts=mask_of_embeddings)


def test_a_backward_with_create_graph_alone_adds_nothing_but_counts(warned):
    def loop(model, watch, _):
        model.set_attn_implementation("eager")
        optimizer = sgd(model)
        loss = model(**DATA[0]).loss
        loss.backward(create_graph=True)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None

    balanced, plain = both(loop)
    ((ratio, rest),) = coefficients(balanced, plain)
    assert abs(ratio) < TOLERANCE and rest < TOLERANCE and len(warned.about("create_graph=True alone")) == 1
    assert balanced.moves == 1 and balanced.steps[0].logged == int(tokens_of(DATA[0]).sum())


# ---------------------------------------------------------------------- optimizers that do more than step


@pytest.mark.parametrize("evaluations", [1, 2])
def test_lbfgs_calls_a_closure(evaluations):
    """Each gradient computed in a closure is the declared one. The duals move once, when LBFGS is done."""

    def loop(model, watch, _):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.0, max_iter=evaluations, max_eval=evaluations)
        for batch in DATA[:2]:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                watch.take()
                return loss

            optimizer.step(closure)

    balanced, plain = both(loop, by_itself=False)
    assert len(plain.steps) == 2 * evaluations and balanced.moves == 2
    for ratio, rest in coefficients(balanced, plain):
        assert abs(ratio - 1) < TOLERANCE and rest < 5 * TOLERANCE
    assert balanced.steps[-1].logged == int(tokens_of(DATA[1]).sum())


def test_sam_steps_with_the_gradient_at_the_perturbed_weights():
    """The first backward only finds the direction, the second one counts. Both runs are perturbed alike."""
    perturbations = []

    def loop(model, watch, balancer):
        optimizer, parameters = sgd(model), list(model.parameters())
        for number, batch in enumerate(DATA[:2]):
            model(**batch).loss.backward()
            watch.forget()
            if balancer is not None:
                perturbations.append([None if p.grad is None else 0.05 * p.grad / p.grad.norm() for p in parameters])
            applied = [(p, e) for p, e in zip(parameters, perturbations[number]) if e is not None]
            with torch.no_grad():
                for parameter, perturbation in applied:
                    parameter.add_(perturbation)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            with torch.no_grad():
                for parameter, perturbation in applied:
                    parameter.sub_(perturbation)
            optimizer.step()
            optimizer.zero_grad()

    assert_declared(*both(loop))


def test_an_optimizer_for_each_parameter_steps_inside_the_backward(warned):
    def loop(model, watch, _):
        own = {parameter: SGD([parameter], lr=0.0) for parameter in model.parameters()}

        def step(parameter):
            own[parameter].step()
            own[parameter].zero_grad()

        for parameter in own:
            parameter.register_post_accumulate_grad_hook(step)
        for batch in DATA[:3]:
            model(**batch).loss.backward()

    assert_declared(*both(loop))
    assert not warned.lines


@pytest.mark.parametrize("announced", [False, True])
def test_two_optimizers_share_one_model(announced):
    """For example Muon for matrices and AdamW for the rest. The duals take one step for both."""

    def loop(model, watch, balancer):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        optimizers = SGD(matrices, lr=0.0), AdamW(others, lr=0.0)
        for step in (DATA[:2], DATA[2:4]) if announced else ([DATA[0]], [DATA[1]]):
            if balancer is not None and announced:
                balancer.begin_step(step)
            for batch in step:
                (model(**batch).loss / len(step)).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    assert_declared(*both(loop))


def test_the_optimizer_of_another_model_ends_nothing():
    """For example a discriminator that steps between the micro-batches of a generator."""

    def loop(model, watch, balancer):
        optimizer, other = sgd(model), nn.Linear(2, 2)
        others = SGD(other.parameters(), lr=0.1)
        if balancer is not None:
            balancer.begin_step(DATA[:2])
        for batch in DATA[:2]:
            (model(**batch).loss / 2).backward()
            one_step(other, others, other(torch.ones(2)).sum())
        optimizer.step()

    assert_declared(*both(loop))


# ---------------------------------------------------------------------- given up


def given_up(model, watch, _):
    """The gradient of a micro-batch is dropped before the optimizer steps."""
    optimizer = sgd(model)
    model(**DATA[0]).loss.backward()
    optimizer.zero_grad()
    watch.forget()
    one_step(model, optimizer, model(**DATA[1]).loss)


def given_up_with_zeros(model, watch, balancer):
    """The same, but gradients are set to 0 instead of `None`, so the loop tells the balancer."""
    optimizer = sgd(model)
    model(**DATA[0]).loss.backward()
    optimizer.zero_grad(set_to_none=False)
    if balancer is not None:
        balancer.discard_step()
    watch.forget()
    one_step(model, optimizer, model(**DATA[1]).loss)


def given_up_after_an_announcement(model, watch, balancer):
    """The same, and the next announcement comes instead."""
    optimizer = sgd(model)
    for batch in DATA[:2]:
        if balancer is not None:
            balancer.begin_step([batch])
        watch.forget()
        model(**batch).loss.backward()
        if batch is DATA[0]:
            optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def not_finite(model, watch, _):
    """Skips a micro-batch with NaN loss before its backward."""
    optimizer = sgd(model)
    for number, batch in enumerate(DATA[:4]):
        loss = model(**batch).loss * (float("nan") if number in (0, 2) else 1.0)
        if not torch.isfinite(loss):
            watch.forget()
            continue
        one_step(model, optimizer, loss)


def failed(model, watch, _):
    """A forward fails halfway, as when memory runs out. It is repeated with half of the batch."""
    optimizer = sgd(model)

    def fail(*_):
        raise MemoryError

    for batch in DATA[:2]:
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with contextlib.suppress(MemoryError):
            model(**batch)
        handle.remove()
        watch.forget()
        one_step(model, optimizer, model(**{name: tensor[:1] for name, tensor in batch.items()}).loss)


@pytest.mark.parametrize("loop", [given_up, given_up_with_zeros, given_up_after_an_announcement, not_finite, failed])
def test_what_is_given_up_neither_pays_nor_counts(loop):
    assert_declared(*both(loop))


# ---------------------------------------------------------------------- several backwards of a forward


def measured_first(model, loss):
    """The gradient is measured, dropped, and made again."""
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def one_by_one(model, loss):
    """CAGrad makes the gradient of each task by itself, and takes their mean."""
    found = []
    for factor in (0.5, 1.5):
        model.zero_grad()
        (factor * loss).backward(retain_graph=True)
        found.append([p.grad for p in model.parameters()])
    for parameter, *parts in zip(model.parameters(), *found):
        parameter.grad = torch.stack(parts).mean(0)


def in_parts(model, loss):
    """Two backwards add up."""
    (0.5 * loss).backward(retain_graph=True)
    (0.5 * loss).backward()


@pytest.mark.parametrize("backward", [measured_first, one_by_one, in_parts])
@pytest.mark.parametrize("tied", [False, True])
def test_several_backwards_of_a_forward(backward, tied):
    def loop(model, watch, _):
        optimizer = sgd(model)
        for batch in DATA[:2]:
            backward(model, model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    found = both(loop, tie_word_embeddings=tied)
    assert_declared(*found, lambda: ordinary(tie_word_embeddings=tied))


def test_forwards_in_a_hook_of_a_leaf(warned):
    """sentence-transformers' cached losses run their forwards in the backward of a loss that is a leaf."""
    model = priced(phb.patch(ordinary().train(), {"coef": COEF}))
    balancer, found = phb.get_balancer(model), []

    def run(gradient):
        with torch.enable_grad():
            model(**DATA[0]).loss.backward()

    for is_leaf in (False, True):
        loss = torch.zeros((), requires_grad=True) if is_leaf else model(**DATA[0]).loss
        if is_leaf:
            loss.register_hook(run)
        loss.backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, balancer.now.counts.flat))
        model.zero_grad()
        balancer.discard_step()
    assert_same(*(gradients for gradients, _ in found))
    torch.testing.assert_close(found[0][1], found[1][1])


# ---------------------------------------------------------------------- fp16: the scale of a GradScaler


def sharded_scaler(device, **options):
    """FSDP's GradScaler has a `scale` of its own, and accelerate imports it after the patch."""

    class Sharded(torch.amp.GradScaler):
        def scale(self, outputs):
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(torch.device(device))
            return outputs * self._scale

    return Sharded(device, **options)


def scaled(optimizer, steps, announced=False, unscale=False, autocast=None, make_scaler=torch.amp.GradScaler):
    def loop(model, watch, balancer):
        own, scaler = optimizer(model), make_scaler("cpu", init_scale=1024.0)
        for step in steps:
            if balancer is not None and announced:
                balancer.begin_step(step)
            for batch in step:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = model(**batch).loss / len(step)
                scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(own)
            scaler.step(own)
            scaler.update()
            own.zero_grad()

    return loop


ONE_EACH = [[DATA[0]], [DATA[1]]]
SCALED = {
    "sgd": scaled(sgd, ONE_EACH),
    "unscaled before clipping": scaled(sgd, ONE_EACH, unscale=True),
    "fused adamw": scaled(OPTIMIZERS["adamw fused"], ONE_EACH),
    "accumulation": scaled(sgd, [DATA[:3], DATA[3:5]], announced=True),
    "a class made since": scaled(sgd, ONE_EACH, make_scaler=sharded_scaler),
}


@pytest.mark.parametrize("loop", SCALED)
def test_the_scale_of_a_grad_scaler_is_found(loop):
    assert_declared(*both(SCALED[loop]))


def test_an_optimizer_that_is_not_of_torch_under_a_grad_scaler():
    """The loop calls `balancer.step()`, as it must. The first of three steps overflows."""

    class Own:
        def __init__(self, model):
            self.param_groups = [{"params": list(model.parameters())}]

        def step(self):
            pass

    model = phb.patch(ordinary().train(), {"coef": COEF})
    balancer, own, scaler = phb.get_balancer(model), Own(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(DATA[:3]):
        scaler.scale(model(**batch).loss * (1.0 if number else math.inf)).backward()
        scaler.step(own)
        scaler.update()
        if number:
            balancer.step()
        model.zero_grad()
        assert balancer.steps == number


def test_fp16_autocast_under_a_grad_scaler():
    assert_declared(*both(scaled(sgd, ONE_EACH, autocast=torch.float16)), **LOW["16-mixed"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
@pytest.mark.parametrize("zero_grad", ["after", "before"])
def test_a_step_that_overflows_moves_nothing(optimizer, zero_grad):
    """The second of three steps overflows. The third is exact, and the duals move in the first and the third."""

    def loop(model, watch, balancer):
        own, scaler = OPTIMIZERS[optimizer](model), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number, batch in enumerate(DATA[:3]):
            before = balancer and (balancer.steps, balancer.prices())
            loss = model(**batch).loss
            if zero_grad == "before":
                own.zero_grad()
            scaler.scale(loss).backward()
            if number == 1:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            scaler.step(own)
            scaler.update()
            if zero_grad == "after":
                own.zero_grad()
            if number == 1:
                watch.forget()
            if number == 1 and balancer is not None:
                assert all(torch.equal(price, before[1][name]) for name, price in balancer.prices().items())

    assert_declared(*both(loop))


# ---------------------------------------------------------------------- accelerate, Fabric, Lightning


def forget_accelerators():
    """Accelerators in a process share settings. Clears them afterwards."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerated(accumulation, precision="no", announced=False, count=4):
    def loop(model, watch, balancer):
        forget_accelerators()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision)
        loader = torch.utils.data.DataLoader(DATA[:count], batch_size=None)
        wrapped, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
        for number, batch in enumerate(loader):
            if balancer is not None and announced and number % accumulation == 0:
                balancer.begin_step(DATA[number : number + accumulation])
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        forget_accelerators()

    return loop


ACCELERATED = {
    "one backward": (accelerated(1), {}),
    "bf16": (accelerated(1, "bf16"), LOW["bf16-mixed"]),
    "accumulate": (accelerated(2), {"evenly": True}),
    "accumulate, announced by batches": (accelerated(2, announced=True), {}),
}


@pytest.mark.parametrize("case", ACCELERATED)
def test_accelerate(case):
    """`accumulate` gives the number of backwards in a step. Passing the batches makes it exact by tokens."""
    loop, how = ACCELERATED[case]
    assert_declared(*both(loop), **how)


def at_precision(precision, plugin):
    """Returns the precision options of Lightning and Fabric. For fp16 their default scaler needs CUDA."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [plugin(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision):
    """A step of one micro-batch, then a step of two that are announced."""

    def loop(model, watch, balancer):
        fabric = Fabric(accelerator="cpu", devices=1, **at_precision(precision, FabricPrecision))
        wrapped, optimizer = fabric.setup(model, sgd(model))
        for step in (DATA[:1], DATA[1:3]):
            if balancer is not None and len(step) > 1:
                balancer.begin_step(step)
            for batch in step:
                fabric.backward(wrapped(**batch).loss / len(step))
            optimizer.step()
            optimizer.zero_grad()

    assert_declared(*both(loop), **LOW.get(precision, {}))


def test_a_remainder_under_accumulate_gets_what_its_loss_gets():
    """accelerate divides the loss of each micro-batch by 2, even if the last step has only one."""
    balanced, plain = both(accelerated(2, count=3))
    (first, _), (last, rest) = coefficients(balanced, plain, evenly=True)
    assert abs(first - 1) < TOLERANCE and abs(last - 1 / 2) < TOLERANCE and rest < 5 * TOLERANCE
    assert balanced.moves == 2


class Module(lightning.LightningModule):
    """Automatic optimization steps with a closure. Batches come one by one, so only their number is announced."""

    def __init__(self, model, watch, balancer):
        super().__init__()
        self.model, self.watch, self.__dict__["balancer"] = model, watch, balancer

    def training_step(self, batch, batch_idx):
        number = self.trainer.accumulate_grad_batches
        if self.balancer is not None and number > 1 and batch_idx % number == 0:
            self.balancer.begin_step(number)
        return self.model(**batch).loss

    def on_before_optimizer_step(self, optimizer):
        self.watch.take()

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("accumulation", "precision"), [(1, "32-true"), (2, "32-true"), (1, "bf16-mixed"), (1, "16-mixed")]
)
def test_lightning(accumulation, precision):
    def loop(model, watch, balancer):
        options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "barebones": True}
        trainer = lightning.Trainer(
            accumulate_grad_batches=accumulation, **options, **at_precision(precision, LightningPrecision)
        )
        trainer.fit(Module(model, watch, balancer), torch.utils.data.DataLoader(DATA[:4], batch_size=None))

    assert_declared(*both(loop, by_itself=False), evenly=True, **LOW.get(precision, {}))


# ---------------------------------------------------------------------- eval mode, as from_pretrained returns a model


def test_a_loaded_model_may_be_looked_at_before_it_trains():
    """Forwards in eval mode, with gradients or not, are not counted and get no price gradient."""
    watches = []
    for balanced in (True, False):
        model = loaded("mixtral", balanced)
        assert not model.training
        watch, optimizer = Watch(model), sgd(model)
        with torch.no_grad():
            model(**DATA[0])
        model.generate(DATA[0]["input_ids"][1:], max_new_tokens=3, do_sample=False)
        model(**DATA[0])
        watch.forget()
        model.train()
        for batch in DATA[1:3]:
            one_step(model, optimizer, model(**batch).loss)
            model.eval()
            with torch.no_grad():
                model(**DATA[0])
            model.train()
        watches.append(watch.close())
    assert_declared(*watches)


def test_a_model_that_trains_in_eval_mode_is_balanced_or_says_that_it_is_not(warned):
    """Many loops never call `train()`, since their model has no dropout."""

    def loop(model, watch, _):
        model.eval()
        optimizer = sgd(model)
        for number in range(10):
            one_step(model, optimizer, model(**DATA[number % 6]).loss)

    try:
        balanced, plain = both(loop)
    except RuntimeError as error:
        assert "train()" in str(error)
        return
    if balanced.moves:
        assert_declared(balanced, plain)
    else:
        assert warned.about("train()") or warned.about("eval mode")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded_from", [0, 2])
def test_padding_without_a_mask_is_said_once(warned, compiled, padded_from):
    model = phb.patch(tiny_model("mixtral").train(), {"coef": COEF})
    run, optimizer = torch.compile(model, backend="aot_eager") if compiled else model, sgd(model)
    for number in range(padded_from + 4):
        batch = tiny_batch(model, 3, 12, padded=number >= padded_from)
        del batch["attention_mask"]
        one_step(run, optimizer, run(**batch).loss)
        assert len(warned.about("Padding is counted")) == (number > padded_from or number == padded_from == 0)


@pytest.mark.parametrize("how", ["masked", "labels", "all", "left out of packed rows", "ends of texts"])
def test_padding_that_does_not_count_or_is_meant_is_not_mentioned(warned, how):
    kind = how if how in ("labels", "all") else "attention"
    model = phb.patch(tiny_model("mixtral").train(), {"coef": COEF, "token_mask": kind})
    batch = tiny_batch(model, 3, 12)
    mask = batch["attention_mask"] if how == "masked" else batch.pop("attention_mask")
    if how == "left out of packed rows":
        batch["position_ids"] = torch.arange(12).expand(3, -1) * mask
    if how == "ends of texts":
        batch = tiny_batch(model, 3, 12, padded=False)
        del batch["attention_mask"]
        batch["input_ids"][:, -1] = model.config.pad_token_id
    optimizer = sgd(model)
    for _ in range(3):
        one_step(model, optimizer, model(**batch).loss)
    assert not warned.about("Padding is counted")
