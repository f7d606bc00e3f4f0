"""The one way anything is trained: transformers' Trainer around a model, an objective and a schedule of batches."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

from deepfusion.config import Runtime, Training
from deepfusion.data.batches import Schedule, collate, isolation_mask
from deepfusion.families import experts, family, head
from deepfusion.layouts import grouped
from deepfusion.objectives.base import Objective, Predictions
from deepfusion.precision import usable
from deepfusion.progress import Ticker

SCRATCH = ".trainer"  # hidden: never part of an artifact
COMPLETE = "complete"


class Learner(nn.Module):
    """A student and what it is trained on. The objective's parameters stay here: a saved student has only its own.

    With `balance`, a MoE's load-balance loss is added; with `ownership`, a cross-entropy that sends every token of a
    document to the expert, or the experts together, of the cluster that knows the document.
    """

    accepts_loss_kwargs = False  # the objective normalises; Trainer must not do it again
    _keys_to_ignore_on_save = None  # Trainer asks when it reloads the best weights

    def __init__(
        self, student: PreTrainedModel, objective: Objective, *, balance: float = 0.0, ownership: float = 0.0
    ) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.balance, self.ownership = balance, ownership

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss of one batch (see `data.batches.collate`)."""
        outputs = run(
            self.student,
            batch,
            hidden_states=self.objective.needs_hidden_states,
            router_logits=self.balance > 0 or self.ownership > 0,
        )
        terms = self.objective(batch, outputs.predictions, outputs.hidden_states)
        loss = terms["loss"]
        if self.balance:
            moe = experts(self.student.config)
            real = (batch["document"] >= 0).to(loss.dtype)
            loss = loss + self.balance * load_balancing_loss_func(
                outputs.router_logits,  # pyright: ignore[reportArgumentType] (its `tuple[Tensor]` means any length)
                moe.count,
                moe.chosen,
                real,
            )
        if self.ownership:
            owner = batch["cluster"].reshape(-1)
            if bool((owner >= 0).any()):
                clusters = experts(self.student.config).clusters
                votes = [
                    nn.functional.cross_entropy(grouped(r, clusters), owner, ignore_index=-1)
                    for r in outputs.router_logits
                ]
                loss = loss + self.ownership * torch.stack(votes).mean()
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes, once each: frozen weights are the checkpoint's own, and may be quantised.

        safetensors refuses second names of tied tensors.
        """
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        kept = {name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter.requires_grad}
        kept |= {name for name, _ in self.named_buffers(remove_duplicate=False)}
        state = {name: tensor for name, tensor in state.items() if name in kept}
        seen: set[int] = set()
        return {
            name: tensor
            for name, tensor in state.items()
            if not isinstance(tensor, Tensor) or (tensor.data_ptr() not in seen and not seen.add(tensor.data_ptr()))
        }


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gave."""

    predictions: Predictions  # head not yet applied
    hidden_states: tuple[Tensor, ...] | None  # embeddings, then after each layer: [B, T, H]
    router_logits: tuple[Tensor, ...]  # per layer [B·T, experts]; empty unless asked for


def run(
    model: PreTrainedModel, batch: Mapping[str, Tensor], *, hidden_states: bool = False, router_logits: bool = False
) -> Outputs:
    """One forward pass over packed rows, documents kept apart by attention and positions.

    Raises:
        ValueError: a row holds several documents and the family cannot keep them apart.
    """
    asked: dict[str, Any] = {"output_router_logits": True} if router_logits else {}
    outputs: Any = model.base_model(
        **_isolated(model, batch), use_cache=False, output_hidden_states=hidden_states, **asked
    )
    return Outputs(
        Predictions(outputs.last_hidden_state, head(model), model.config.vocab_size),
        outputs.hidden_states if hidden_states else None,
        outputs.router_logits if router_logits else (),
    )


def _isolated(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inputs with which a model of this family sees each document alone."""
    kind = family(model.config.model_type)
    document = batch["document"]
    if kind.packs:
        mask = kind.attention_masks(model.config, isolation_mask(document))
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
    if bool((batch["position_ids"][:, 1:] == 0).logical_and(document[:, 1:] >= 0).any()):
        raise ValueError(f"{kind.model_type} cannot keep documents apart within a row: give each its own")
    return {"input_ids": batch["input_ids"], "attention_mask": (document >= 0).long()}


@dataclass(frozen=True)
class Fit:
    """What a training did."""

    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]


class _Bookkeeper(TrainerCallback):
    """Progress, the loss curve, and checkpoints by the clock; what they hold does not depend on when they are taken."""

    def __init__(self, into: Path, schedule: Schedule, seconds: float) -> None:
        self.into, self.seconds = into, seconds
        self.per_step = schedule.tokens / len(schedule)
        self.ticker: Ticker | None = None
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ticker is None:
            done = (state.global_step - 1) * self.per_step
            self.ticker = Ticker(self.into, state.max_steps * self.per_step, "tokens", done)
        self.ticker.advance(self.per_step)
        due = time.monotonic() - self.saved_at > self.seconds and state.global_step < state.max_steps
        if due and state.global_step % args.logging_steps == 0:  # a sum of losses under way is in no checkpoint
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_at = time.monotonic()
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # stopped early: who resumes here would train on, so let them come here again
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Trainer(Trainer):
    """Trainer with a schedule that already has its order and batches."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def fit(
    learner: Learner,
    schedule: Schedule,
    training: Training,
    *,
    seed: int,
    into: Path,
    runtime: Runtime,
    heldout: Schedule | None = None,
    patience: int = 3,
    evaluations: int = 20,
) -> Fit:
    """Train in place, resuming from what an interrupted attempt left in `into`.

    With `heldout`, its loss is measured `evaluations` times; training stops after `patience` of them without
    improvement and the best weights are kept. An uninterrupted and a resumed training give the same bits.
    """
    scratch = into / SCRATCH
    resume_from = _latest_complete(scratch)
    steps = len(schedule)
    logged = max(1, steps // 50)
    every = max(1, steps // evaluations // logged) * logged
    # Products of weights that are saved in bfloat16 are in it whatever is asked for: of them there is nothing to note.
    noted_in = into if training.dtype == "float32" else None
    bookkeeper = _Bookkeeper(into, schedule, runtime.checkpoint_seconds)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        logging_strategy="steps",
        logging_steps=logged,
        save_strategy="steps" if heldout is not None else "no",
        save_steps=every,
        save_total_limit=1,
        eval_strategy="steps" if heldout is not None else "no",
        eval_steps=every,
        load_best_model_at_end=heldout is not None,
        restore_callback_states_from_checkpoint=heldout is not None,  # how long its patience has been tried
        metric_for_best_model="eval_loss" if heldout is not None else None,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=runtime.accelerator == "cpu",
        bf16=usable(training.compute, runtime.accelerator, noted_in) == torch.bfloat16,
        seed=seed,
        log_level="error",
    )
    callbacks: list[TrainerCallback] = [bookkeeper]
    if heldout is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    set_seed(seed)
    if training.gradient_checkpointing:
        learner.student.activation_checkpointing_enable()
        learner.student.disable_input_require_grads()  # which only another way of checkpointing needs
    trainer = _Trainer(
        model=learner,
        args=arguments,
        train_dataset=schedule,
        eval_dataset=heldout,
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    learner.to("cpu").eval()
    if training.gradient_checkpointing:
        learner.student.activation_checkpointing_disable()
    taken = trainer.state.global_step
    losses = tuple((int(e["step"]), round(float(e["loss"]), 6)) for e in trainer.state.log_history if "loss" in e)
    return Fit(taken, round(schedule.tokens * taken / steps), losses)


def _latest_complete(scratch: Path) -> Path | None:
    """The newest checkpoint that was written to the end; half-written ones are removed."""
    found: list[Path] = []
    for folder in scratch.glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            found.append(folder)
        else:
            shutil.rmtree(folder)
    return max(found, key=lambda folder: int(folder.name.split("-")[1]), default=None)
