"""What the passes of an assembly take in relation to each other, so that its progress is even.

The effort of a task is its weights times what its function does with each: microseconds of one core, as measured on
the shipped model.
"""

from __future__ import annotations

from tinyonn.dense.parameters import Parameter
from tinyonn.experts.cuts import cut_tensors
from tinyonn.experts.need_passes import count_needs, label_needs, sample_needs
from tinyonn.experts.select import worth_histograms
from tinyonn.experts.shards import Shard, write_shard
from tinyonn.workers.tasks import Call

EFFORT = {
    worth_histograms: 0.4,
    cut_tensors: 0.15,
    count_needs: 0.3,
    sample_needs: 0.25,
    label_needs: 0.5,
    write_shard: 0.1,
}
OF_NEED = (count_needs, sample_needs, label_needs)


def effort_of(weights: int, by_need: bool) -> float:
    """Of all tasks that assemble so many weights."""
    return sum(each * weights for function, each in EFFORT.items() if by_need or function not in OF_NEED)


def call_effort(call: Call) -> float:
    """Of one task."""
    function, arguments = call
    parts = [part.cut if isinstance(part, Shard) else part for part in arguments]
    items = [item for part in parts if isinstance(part, tuple) for item in part]
    parameters = [item[0] if isinstance(item, tuple) else item for item in items]
    return EFFORT[function] * sum(item.size for item in parameters if isinstance(item, Parameter))
