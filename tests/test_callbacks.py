"""Diagnostics logged while training, with the real packages."""

from __future__ import annotations

import csv

import pytest
import torch
from models import GPT

import hc_transform as hct

IDS = torch.randint(3, 65, (4, 12), generator=torch.Generator().manual_seed(0))


def test_the_trainer_of_hugging_face_logs_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_hugging_face import llama

    hc = hct.convert(llama(), kwargs={"input_ids": IDS}, verify=False)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, logging_steps=2
    )
    optimizer = torch.optim.AdamW(hct.parameter_groups(hc, 1e-2, 0.01))
    trainer = transformers.Trainer(hc, args, train_dataset=rows, optimizers=(optimizer, None))
    hct.trainer_callback(trainer, {"input_ids": IDS, "labels": IDS}, every=2)
    trainer.train()
    name = "hyper_connections/model.layers.1.mlp/spread"
    logged = [entry for entry in trainer.state.log_history if name in entry]
    assert [entry["step"] for entry in logged] == [2, 4] and 0 < logged[0][name] < logged[1][name]


def test_lightning_logs_them(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = hct.convert(GPT(depth=2), (IDS, IDS), verify=False)

        def forward(self, ids, targets=None):
            return self.gpt(ids, targets)

        def training_step(self, batch, index):
            return self.gpt(batch[0], batch[0])[1]

        def configure_optimizers(self):
            return torch.optim.AdamW(hct.parameter_groups(self, 1e-2, 0.01))

    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS), batch_size=1)
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        **settings,
        logger=CSVLogger(tmp_path),
        callbacks=[hct.lightning_callback(every=2)],
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), rows)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row.get("hyper_connections/trunk 0/gain_forward")]
    assert [int(row["step"]) for row in logged] == [2, 4]
    assert float(logged[1]["hyper_connections/transformer.h.1.mlp/spread"]) > 0


def test_a_rate_below_one_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="every is a number of steps of at least 1, got 0"):
        hct.trainer_callback(None, {}, every=0)
