"""What vLLM's workers are to tell, as `worker_extension_cls` in each of their processes: the slots of every cut."""

import hashlib

from kvevict.paged import Cut

CHOSEN = []
_select = Cut.select


def select(self, scores):
    indices = _select(self, scores)
    CHOSEN.append([hashlib.sha256(str(head.tolist()).encode()).hexdigest() for head in indices.unbind(1)])
    return indices


class Trace:
    def chosen(self):
        Cut.select = select
        return CHOSEN
