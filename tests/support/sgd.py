"""Settings under which two ways of the same training can be compared to 1e-5: float32 SGD over records in order."""

from seecal import CALConfig


def sgd_config(folder, batch_size, accumulation, **changes):
    settings = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return CALConfig(str(folder), **{**settings, **changes})
