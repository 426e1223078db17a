"""Train in two processes. The second one's loss is not finite in two steps. Each writes its state."""

import json
import sys
from pathlib import Path

import torch
from slope import Slope, infinite_loss, loop, nan_loss, run_steps

from far.processes import joined, leave
from far.training.loop import Trainer

with joined() as processes:
    folder, task = Path(sys.argv[1]), Slope({3: nan_loss, 6: infinite_loss} if processes.rank == 1 else {})
    trainer = Trainer(task, loop(dtype=sys.argv[2], micro_batches=2), folder, processes)
    run_steps(trainer, 12)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.tolist() for name, tensor in trainer.ema.module.state_dict().items()}
    state = {"skipped": trainer.skipped_steps, "scale": trainer.scaler.get_scale(), "weights": weights}
    (folder / f"{processes.rank}.json").write_text(json.dumps(state))
    assert all(torch.isfinite(tensor).all() for tensor in trainer.module.state_dict().values())
leave()
