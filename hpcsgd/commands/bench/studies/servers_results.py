"""What `hpcsgd bench ps` shows, and was to show."""

from __future__ import annotations

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench.studies import time_to_loss
from hpcsgd.commands.bench.studies.comparison import Cells
from hpcsgd.commands.bench.studies.workloads import FAST, WIDER, Setting

_LIMIT = 0.4  # of the baseline's time, on a slow link


class Study(time_to_loss.Study):
    """Parameter servers of each mode, pure and with groups, and AR-SGD; see `losses.Study`."""

    name = "ps"
    slow = 2
    baseline = "ps:mode=sync,groups=8"
    workloads = WIDER
    notes = (
        f"{time_to_loss.Study.notes} Bytes through the servers are pushes and their answers, of a whole run."
    )

    def besides(self, setting: Setting, method: str) -> Cells:
        moved = np.median([trial.server_bytes for trial in self.of(setting, method)])
        return {**super().besides(setting, method), "MB through\nthe servers": f"{moved / 1e6:.0f}"}

    def goals(self) -> list[str]:
        """That of elastic groups beside what was measured, where they and the baseline have run."""
        grouped = [method for method in self.methods if _is_elastic_in_groups(method)]
        return [
            self.sooner(setting, method, _LIMIT)
            for setting in self.settings
            for method in grouped
            if setting.link != FAST and self.of(setting, method) and self.of(setting, self.baseline)
        ]


def _is_elastic_in_groups(method: str) -> bool:
    name, options = registry.parse(method)
    return name == "ps" and options.get("mode") == "elastic" and options.get("groups") == "4"
