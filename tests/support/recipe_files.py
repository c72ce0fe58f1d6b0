"""A recipe around the tiny model and data that examples/tiny_folder.py writes."""

import yaml

QUICK = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
}


def recipe_file(path, tiny, output_dir, **changes):
    settings = {"model": tiny / "model", "data": tiny / "data.json", "output_dir": output_dir}
    settings = {name: str(value) for name, value in settings.items()}
    path.write_text(yaml.safe_dump({**settings, **QUICK, **changes}, sort_keys=False))
    return str(path)
