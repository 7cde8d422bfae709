"""What eviction costs a vLLM worker, as its `worker_extension_cls`: CPU seconds of its main thread, and of eviction."""

import time

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from kvevict.vllm.worker import EvictingBuilder, EvictingImpl

SPENT = dict(eviction_seconds=0.0, steps=0)


def timed(function):
    def called(*args, **options):
        begin = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            SPENT["eviction_seconds"] += time.thread_time() - begin

    return called


def counted(execute):
    def called(self, scheduled, *args, **options):
        SPENT["steps"] += scheduled.total_num_scheduled_tokens > 0
        return execute(self, scheduled, *args, **options)

    return called


EvictingImpl._evict, EvictingBuilder._step = timed(EvictingImpl._evict), timed(EvictingBuilder._step)
GPUModelRunner.execute_model = counted(GPUModelRunner.execute_model)


class Cost:
    def cost(self):
        return dict(SPENT, cpu_seconds=time.thread_time())
