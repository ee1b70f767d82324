"""A stage in the words of the Trainer's arguments."""

from __future__ import annotations

from transformers import TrainingArguments

from psacpo.align.config import AlignConfig
from psacpo.align.planning import Task


def training_arguments(config: AlignConfig, task: Task, device: str, output_dir: str) -> TrainingArguments:
    """The stage in the Trainer's words. Nothing is printed or evaluated by the Trainer itself."""
    stage = task.stage
    scheduler: str = stage.lr_scheduler
    if scheduler == "constant" and stage.warmup_steps:
        scheduler = "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_steps=task.steps,
        learning_rate=config.learning_rate_of(stage),
        lr_scheduler_type=scheduler,
        warmup_steps=stage.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_betas[0],
        adam_beta2=stage.adam_betas[1],
        max_grad_norm=stage.max_grad_norm,
        use_cpu=device == "cpu",
        bf16=config.dtype == "bfloat16",
        # Scaled float16 training needs an accelerator; on a CPU float16 weights are used as they are.
        fp16=config.dtype == "float16" and device == "cuda",
        seed=task.seed,
        data_seed=task.seed,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        # Every step comes to `PairTrainer.log`, which keeps it.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to) or "none",
        run_name=f"{config.out.name or 'align'}-{stage.name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # They are constants here, and sending them at every forward would need equally many on every process.
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=device == "cuda",
    )
    # Several visible GPUs in one process would be DataParallel, which splits a batch between chosen and rejected.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
