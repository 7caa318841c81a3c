"""The real Trainers: what they do to an optimizer, AdamW beside ``MetaAdamW``, and runs that stop and go on."""

import copy
import warnings

import lightning
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from conftest import assert_same, cross_entropy, largest_gap, tiny, train
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from metaadamw_lite import MetaAdamW

PLAIN = {"alpha_range": 0, "beta_range": 0}

has_gloo = dist.is_available() and dist.is_gloo_available()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def members(optimizer):
    return {group.name: set(group.params) for group in optimizer.groups}


def held(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]}


def moved(model, before):
    return {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}


# ---------------------------------------------------------------- Lightning


class Lit(lightning.LightningModule):
    def __init__(self, make, meta_every=None):
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
        self.backbone = nn.Sequential(blocks[0], nn.Tanh(), blocks[1][3])
        self.head = nn.Linear(8, 1)
        self.make = make
        self.meta_every = meta_every
        self.double()

    def forward(self, x):
        return self.head(self.backbone(x))

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch)

    def on_train_batch_end(self, outputs, batch, index):
        if self.meta_every and (index + 1) % self.meta_every == 0:
            optimizer = self.optimizers().optimizer
            optimizer.update_attention(self.trainer.strategy.model, batch, batch, lit_loss, batch)

    def configure_optimizers(self):
        return self.make(self)


def lit_loss(lit, batch):
    return lit.loss(batch)


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=6)


def trainer_of(path, epochs, *callbacks):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=list(callbacks),
    )


class Thaw(BaseFinetuning):
    """The head alone at first, the backbone from an epoch on, its parts one after the other."""

    def freeze_before_training(self, lit):
        self.freeze(lit.backbone)

    def finetune_function(self, lit, epoch, optimizer):
        for part, from_epoch in ((lit.backbone[2], 1), (lit.backbone[0], 3)):
            if epoch >= from_epoch:
                self.unfreeze_and_add_param_group(part, optimizer, initial_denom_lr=2.0)


def trainable(module):
    return filter(lambda p: p.requires_grad, module.parameters())


def trainable_pairs(module):
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


LIT_WAYS = {
    "named": lambda lit, **settings: MetaAdamW(lit.named_parameters(), **settings),
    "tensors": lambda lit, **settings: MetaAdamW(trainable(lit), **settings),
    "tensors of the model": lambda lit, **settings: MetaAdamW(trainable(lit), model=lit, **settings),
    "pairs": lambda lit, **settings: MetaAdamW(trainable_pairs(lit), **settings),
    "groups": lambda lit, **settings: MetaAdamW([{"params": trainable_pairs(lit), "lr": 0.05}], **settings),
    "original": lambda lit, **settings: MetaAdamW(trainable(lit), group_strategy="original", **settings),
}
ADAMW_WAYS = {name: (lambda lit, **settings: torch.optim.AdamW(trainable(lit), **settings)) for name in LIT_WAYS} | {
    "named": lambda lit, **settings: torch.optim.AdamW(lit.parameters(), **settings),
    "groups": lambda lit, **settings: torch.optim.AdamW([{"params": list(trainable(lit)), "lr": 0.05}], **settings),
}
lightning_only = [
    pytest.mark.filterwarnings("ignore:The provided params to be frozen"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def fit(path, make, epochs, *callbacks, meta_every=None, resume=None):
    lit = Lit(make, meta_every)
    trainer = trainer_of(path, epochs, *callbacks)
    trainer.fit(lit, loader(), ckpt_path=resume)
    return lit, trainer


@pytest.mark.parametrize("way", LIT_WAYS)
def test_fine_tuning_in_lightning_trains_what_adamw_trains(tmp_path, way):
    ours, trainer = fit(tmp_path, lambda lit: LIT_WAYS[way](lit, lr=0.02, **PLAIN), 5, Thaw())
    theirs, reference = fit(tmp_path, lambda lit: ADAMW_WAYS[way](lit, lr=0.02), 5, Thaw())
    (optimizer,), (adamw,) = trainer.optimizers, reference.optimizers
    assert len(optimizer.param_groups) == len(adamw.param_groups) == (1 if way == "named" else 3)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in adamw.param_groups]
    assert moved(ours, dict(Lit(None).named_parameters())) == {name for name, _ in ours.named_parameters()}
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


@pytest.mark.parametrize("way", LIT_WAYS)
@pytest.mark.parametrize("stopped", [1, 2, 4], ids=lambda n: f"after {n}")
def test_fine_tuning_in_lightning_stops_and_goes_on_with_the_same_bits(tmp_path, way, stopped):
    """Before the first part thaws, between the two, and after both; with meta-updates all along."""

    def make(lit):
        return LIT_WAYS[way](lit, lr=0.02, meta_lr=0.1)

    whole, trainer = fit(tmp_path, make, 6, Thaw(), meta_every=2)
    path = tmp_path / "stopped.ckpt"
    _, first = fit(tmp_path, make, stopped, Thaw(), meta_every=2)
    first.save_checkpoint(path)
    resumed, second = fit(tmp_path, make, 6, Thaw(), meta_every=2, resume=path)
    assert second.global_step == trainer.global_step == 24
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(second.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


@pytest.mark.parametrize("stopped", [1, 3], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("way", ["named", "tensors", "tensors of the model"])
def test_lightnings_own_callback_acts_as_on_adamw(tmp_path, way, stopped):
    def callback():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01, should_align=False)

    def resume(make, name):
        _, first = fit(tmp_path, make, stopped, callback())
        first.save_checkpoint(tmp_path / name)
        return fit(tmp_path, make, 5, callback(), resume=tmp_path / name)

    ours, trainer = resume(lambda lit: LIT_WAYS[way](lit, lr=0.02, **PLAIN), "ours")
    theirs, reference = resume(lambda lit: ADAMW_WAYS[way](lit, lr=0.02), "theirs")
    rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, reference)]
    assert rates[0] == rates[1]
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


def test_parts_that_thaw_are_in_the_groups_of_their_layers_where_the_model_is_known(tmp_path):
    lit, trainer = fit(tmp_path, lambda lit: LIT_WAYS["tensors of the model"](lit), 4, Thaw())
    assert members(trainer.optimizers[0]) == members(MetaAdamW(lit.named_parameters()))


def test_parts_that_thaw_without_names_form_groups_of_their_own_and_one_warning(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, trainer = fit(tmp_path, lambda lit: LIT_WAYS["pairs"](lit), 4, Thaw())
    names = set(members(trainer.optimizers[0]))
    assert {"param_group_1", "param_group_2"} < names
    assert len(names) == 4, "weight and bias of the head"
    (warning,) = [w for w in said if "named_from" in str(w.message)]
    assert warning.category is UserWarning


@pytest.mark.parametrize("way", ["named", "tensors"])
def test_lightning_without_a_callback_stops_and_goes_on_with_the_same_bits(tmp_path, way):
    def make(lit):
        optimizer = LIT_WAYS[way](lit, lr=0.02, meta_lr=0.1, meta_optimizer="adam")
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    whole, trainer = fit(tmp_path, make, 4, meta_every=2)
    _, first = fit(tmp_path, make, 2, meta_every=2)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, second = fit(tmp_path, make, 4, meta_every=2, resume=tmp_path / "stopped.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(second.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


# ---------------------------------------------------------------- Fabric


def fabric_run(make, batches, path=None):
    """A loop as Fabric's own pages write it, saved and gone on with in the middle where a path is given."""
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = tiny(dropout=0.0)
    model, optimizer = fabric.setup(inner, make(inner))
    for part in (batches[:4], batches[4:8]):
        if path is not None and optimizer.optimizer.state:
            fabric.save(path, {"model": model, "optimizer": optimizer})
            fabric = Fabric(accelerator="cpu", devices=1)
            inner = tiny(dropout=0.0, seed=7)
            model, optimizer = fabric.setup(inner, make(inner))
            fabric.load(path, {"model": model, "optimizer": optimizer})
        for batch in part:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model, batch))
            optimizer.step()
        if isinstance(optimizer.optimizer, MetaAdamW):
            optimizer.optimizer.update_attention(model.module, *part[:2], cross_entropy, part[2])
    return inner, optimizer.optimizer


def test_fabric_trains_as_with_adamw(batches):
    ours, _ = fabric_run(lambda model: MetaAdamW(model.named_parameters(), lr=0.02, **PLAIN), batches)
    theirs, _ = fabric_run(lambda model: torch.optim.AdamW(model.parameters(), lr=0.02), batches)
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


def test_fabric_stops_and_goes_on_with_the_same_bits(batches, tmp_path):
    def make(model):
        return MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1)

    whole, optimizer = fabric_run(make, batches)
    resumed, again = fabric_run(make, batches, tmp_path / "saved.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(again.state_dict(), optimizer.state_dict())


def test_the_plain_loop_and_fabrics_are_the_same(batches):
    model = tiny(dropout=0.0)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1)
    for some in (batches[:4], batches[4:8]):
        train(model, optimizer, some)
        optimizer.update_attention(model, *some[:2], cross_entropy, some[2])
    ours, _ = fabric_run(lambda model: MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1), batches)
    assert_same(dict(ours.state_dict()), dict(model.state_dict()))


# ---------------------------------------------------------------- Accelerate


def prepared(make, seed=0):
    accelerator = Accelerator(cpu=True)
    inner = tiny(dropout=0.0, seed=seed)
    return accelerator, inner, *accelerator.prepare(inner, make(inner))


def accelerated(make, batches, path=None):
    """A loop as Accelerate's pages write it, saved and gone on with in the middle where a path is given."""
    accelerator, inner, model, optimizer = prepared(make)
    for part in (batches[:4], batches[4:8]):
        if path is not None and optimizer.state:
            accelerator.save_state(path)
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator, inner, model, optimizer = prepared(make, seed=7)
            accelerator.load_state(path)
        for batch in part:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model, batch))
            optimizer.step()
        if isinstance(optimizer.optimizer, MetaAdamW):
            optimizer.optimizer.update_attention(model, *part[:2], cross_entropy, part[2])
    return inner, optimizer.optimizer


@pytest.mark.parametrize("named", [True, False])
def test_accelerate_trains_as_with_adamw(batches, named):
    def make(model):
        return MetaAdamW(model.named_parameters() if named else list(model.parameters()), lr=0.02, **PLAIN)

    ours, optimizer = accelerated(make, batches)
    theirs, _ = accelerated(lambda model: torch.optim.AdamW(model.parameters(), lr=0.02), batches)
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12
    assert "meta" not in optimizer.param_groups[0]


def test_accelerate_stops_and_goes_on_with_the_same_bits(batches, tmp_path):
    def make(model):
        return MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1, meta_optimizer="adam")

    whole, optimizer = accelerated(make, batches)
    resumed, again = accelerated(make, batches, str(tmp_path))
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(again.state_dict(), optimizer.state_dict())


def test_preparing_leaves_the_optimizer_as_it_was(batches):
    """Accelerate saves its state and loads it again, moved to the device."""
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1)
    train(model, optimizer, batches[:3])
    before = copy.deepcopy(optimizer.state_dict())
    Accelerator(cpu=True).prepare(model, optimizer)
    assert_same(optimizer.state_dict(), before)


def shard_as_accelerate_does(model, optimizer, shard):
    """``Accelerator._prepare_fsdp2``, in its order: placeholders, sharding, and its own function."""
    numbers = {name: p.data_ptr() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for k, p in enumerate(group["params"]):
            group["params"][k] = torch.empty(1, dtype=p.dtype, device=p.device)
            group["params"][k].data_ptr = p.data_ptr()
    shard(model)
    mapping = {numbers[name]: p for name, p in model.named_parameters()}
    fsdp2_switch_optimizer_parameters(optimizer, mapping)


def copy_parameters(model):
    """Other objects in other memory, without processes."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDED_WAYS = {
    "named": lambda model, **settings: MetaAdamW(model.named_parameters(), **settings),
    "pairs": lambda model, **settings: MetaAdamW(list(model.named_parameters()), **settings),
    "tensors": lambda model, **settings: MetaAdamW(model.parameters(), **settings),
    "decay or not": lambda model, **settings: MetaAdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        model=model,
        **settings,
    ),
}


def adamw_beside(way, model):
    if way != "decay or not":
        return torch.optim.AdamW(model.parameters(), lr=0.02)
    weights, rest = ([p for p in model.parameters() if (p.ndim > 1) is w] for w in (True, False))
    groups = [{"params": weights, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.02)


@pytest.mark.parametrize("way", SHARDED_WAYS)
@pytest.mark.parametrize("prepared", [False, True], ids=["bare", "prepared"])
def test_accelerates_switch_of_parameters_is_followed(batches, way, prepared):
    before = dict(tiny(dropout=0.0).named_parameters())
    models = [tiny(dropout=0.0) for _ in range(2)]
    ours, theirs = SHARDED_WAYS[way](models[0], lr=0.02, **PLAIN), adamw_beside(way, models[1])
    names = set(members(ours))
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        wrapped = Accelerator(cpu=True).prepare(optimizer) if prepared else optimizer
        shard_as_accelerate_does(model, wrapped, copy_parameters)
        train(model, wrapped, batches[:4])
    assert moved(models[0], before) == set(before)
    assert set(members(ours)) == names
    assert set().union(*members(ours).values()) == set(models[0].parameters())
    assert largest_gap(*(model.parameters() for model in models)) <= 1e-12


@pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")
@pytest.mark.parametrize("way", SHARDED_WAYS)
def test_accelerates_switch_to_real_shards_is_followed(batches, one_process, way):
    def shard(model):
        for layer in model.layers:
            fully_shard(layer, mesh=one_process)
        fully_shard(model, mesh=one_process)

    before = dict(tiny(dropout=0.0).named_parameters())
    models = [tiny(dropout=0.0) for _ in range(3)]
    optimizers = [
        SHARDED_WAYS[way](models[0], lr=0.02, **PLAIN),
        adamw_beside(way, models[1]),
        SHARDED_WAYS[way](models[2], lr=0.02, meta_lr=0.1),
    ]
    names = set(members(optimizers[2]))
    for model, optimizer in zip(models, optimizers, strict=True):
        shard_as_accelerate_does(model, optimizer, shard)
        train(model, optimizer, batches[:4])
    whole = [[p.full_tensor() for p in model.parameters()] for model in models]
    assert all(isinstance(p, DTensor) for p in held(optimizers[0]))
    assert all(not torch.equal(x, before[name]) for x, name in zip(whole[0], before, strict=True))
    assert largest_gap(*whole[:2]) <= 1e-12
    assert set(members(optimizers[2])) == names
    assert (optimizers[2].alpha != 1).all()
    phi = copy.deepcopy(optimizers[2].modulator.state_dict())
    optimizers[2].update_attention(models[2], *batches[4:6], cross_entropy, batches[6])
    assert not torch.equal(optimizers[2].modulator.output.weight, phi["output.weight"])


# ---------------------------------------------------------------- Hugging Face


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return BertForSequenceClassification(config).double()


def sentences():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (32, 6), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % 2} for row in tokens]


class MetaUpdate(TrainerCallback):
    """Every two steps, on the first sentences."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **others):
        if state.global_step % 2 == 0:
            batch = {name: torch.stack([s[name] for s in sentences()[:8]]) for name in ("input_ids", "labels")}
            optimizer.optimizer.update_attention(model, batch, batch, transformers_loss, batch)


def transformers_loss(model, batch):
    return model(**batch).loss


def hugging_face(path, model, cls, settings, *, resume=None, callbacks=(), **arguments):
    arguments = {"max_steps": 6, "save_strategy": "no", "weight_decay": 0.2, "learning_rate": 1.0} | arguments
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8, **arguments
        ),
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=(cls, settings),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def of_trainer(trainer):
    return trainer.optimizer.optimizer


def test_the_trainer_of_transformers_has_fine_grained_groups_and_its_own_decay(tmp_path):
    model = bert()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = hugging_face(tmp_path, model, MetaAdamW, {"lr": 1e-2, "named_from": model})
    optimizer = of_trainer(trainer)
    assert isinstance(optimizer, MetaAdamW)
    assert members(optimizer) == members(MetaAdamW(model.named_parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert (optimizer.alpha != 1).all()
    assert moved(model, before) == {name for name, _ in model.named_parameters()}
    assert not [w for w in said if "named_from" in str(w.message)]


def test_the_trainer_of_transformers_without_the_model_says_once_what_to_do(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = hugging_face(tmp_path, bert(), MetaAdamW, {"lr": 1e-2})
    assert set(members(of_trainer(trainer))) == {"param_group_0", "param_group_1"}
    (warning,) = [w for w in said if "named_from" in str(w.message)]
    assert warning.category is UserWarning


@pytest.mark.parametrize("named", [True, False])
def test_the_trainer_of_transformers_trains_as_with_adamw(tmp_path, named):
    ours, theirs = bert(), bert()
    named_from = {"named_from": ours} if named else {}
    hugging_face(tmp_path, ours, MetaAdamW, {"lr": 1e-2, **PLAIN, **named_from})
    hugging_face(tmp_path, theirs, torch.optim.AdamW, {"lr": 1e-2})
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


def test_the_trainer_of_transformers_stops_and_goes_on_with_the_same_bits(tmp_path):
    whole = bert()
    settings = {"lr": 1e-2, "meta_lr": 0.1, "meta_optimizer": "adam"}
    saving = {"save_strategy": "steps", "save_steps": 4, "callbacks": [MetaUpdate()]}
    first = hugging_face(tmp_path, whole, MetaAdamW, {**settings, "named_from": whole}, **saving)
    resumed = bert()
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    resume = str(tmp_path / "checkpoint-4")
    second = hugging_face(tmp_path, resumed, MetaAdamW, {**settings, "named_from": resumed}, resume=resume, **saving)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    ours, theirs = (of_trainer(trainer).state_dict() for trainer in (second, first))
    assert ours["meta"]["t"] == 6
    assert_same(ours, theirs)


def test_frozen_parameters_that_the_trainer_leaves_out_are_not_missed(tmp_path):
    """The model has more parameters than the optimizer."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = hugging_face(
        tmp_path, model, MetaAdamW, {"lr": 1e-2, "named_from": model}, callbacks=[MetaUpdate()], max_steps=3
    )
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) == names
    everything = members(MetaAdamW(bert().named_parameters()))
    assert set(members(of_trainer(trainer))) < set(everything), "depths are those of the whole model"
    assert not any(name.startswith("embedding") for name in members(of_trainer(trainer)))


def test_adapters_in_the_trainer_of_transformers_are_grouped_by_their_layers(tmp_path):
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value", "dense"], modules_to_save=[]))
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = hugging_face(
        tmp_path, model, MetaAdamW, {"lr": 1e-2, "named_from": model}, callbacks=[MetaUpdate()], max_steps=3
    )
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert moved(model, before) == names
    assert len(members(of_trainer(trainer))) > 2
    assert not any(name.startswith("param_group") for name in members(of_trainer(trainer)))


# ---------------------------------------------------------------- wrappers, schedulers and lazy modules


class ScheduleFree(torch.optim.Optimizer):
    """As ``schedulefree.ScheduleFreeWrapper``: keeps z in the wrapped optimizer's state of a parameter."""

    def __init__(self, base, momentum=0.9):
        self.base, self.momentum, self.k = base, momentum, 0

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            self.state[p].setdefault("z", p.clone())
        for p in params:  # x, the average, from y; then the step moves z
            x = p.lerp(self.state[p]["z"], 1 - 1 / self.momentum)
            self.state[p]["x"] = x
            p.copy_(self.state[p]["z"])
        self.base.step()
        self.k += 1
        for p in params:
            self.state[p]["z"].copy_(p)
            x = self.state[p].pop("x").lerp_(p, 1 / self.k)
            p.copy_(x.lerp(p, 1 - self.momentum))


KERNELS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_state_that_a_wrapper_puts_there_first_does_no_harm(batches, kernel):
    models = [tiny(dropout=0.0) for _ in range(2)]
    ours = MetaAdamW(models[0].named_parameters(), lr=0.02, **PLAIN, **kernel)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.02, **({"foreach": False} | kernel))
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        if optimizer is theirs:  # torch's own AdamW has a KeyError there; its moments are made by hand
            for p in model.parameters():
                step = torch.zeros((), dtype=torch.float32 if kernel.get("fused") else torch.float64)
                theirs.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        train(model, ScheduleFree(optimizer), batches[:5])
    assert all("z" in ours.state[p] for p in models[0].parameters())
    assert largest_gap(*(model.parameters() for model in models)) <= 1e-12


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_meta_update_before_the_first_step_passes_over_state_of_others(batches, kernel):
    model, twin = tiny(), tiny()
    marked, plain = (MetaAdamW(m.named_parameters(), meta_lr=0.1, **kernel) for m in (model, twin))
    for p in model.parameters():
        marked.state[p]["of another"] = torch.ones(2)
    for m, optimizer in ((model, marked), (twin, plain)):
        torch.manual_seed(0)
        optimizer.update_attention(m, *batches[:2], cross_entropy, batches[2])
        train(m, optimizer, batches[:3])
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert_same(dict(marked.modulator.state_dict()), dict(plain.modulator.state_dict()))
    again = MetaAdamW(twin.named_parameters(), **kernel)
    again.load_state_dict(copy.deepcopy(marked.state_dict()))
    assert torch.equal(again.state[twin.head.weight]["of another"], torch.ones(2, dtype=torch.float64))


def lazy(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


@pytest.mark.parametrize("named", [True, False])
def test_lazy_modules_are_trained_once_they_have_shapes(named):
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    models = [lazy(), lazy()]
    ours = MetaAdamW(models[0].named_parameters() if named else models[0].parameters(), lr=0.02, **PLAIN)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.02, fused=True)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        torch.manual_seed(2)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(*(list(model.parameters()) for model in models), rtol=0, atol=1e-6)
    if named:
        assert members(ours) == members(MetaAdamW(models[0].named_parameters()))


def test_lazy_modules_form_the_groups_of_those_that_are_not():
    """With the sizes and kinds that they turn out to have, though nothing but the shape of a parameter changes."""
    model = lazy()
    pairs = list(model.named_parameters())
    optimizer = MetaAdamW(pairs)
    model(torch.randn(12, 4)).sum().backward()
    optimizer.step()
    assert members(optimizer) == members(MetaAdamW(pairs))
    assert all("parameters" in repr(group) for group in optimizer.groups)
