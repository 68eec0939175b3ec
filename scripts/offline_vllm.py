"""vLLM's side of `bench_vs_vllm.py offline`: runs in vLLM's environment, started by the benchmark.

python offline_vllm.py '{"model": FOLDER, "dtype": "float32", ...}'   (arguments of vllm.LLM)
"""

import json
import sys
from typing import Any

from offline_case import Case, Channel, Timing, TokenClock


def main() -> None:
    channel = Channel()
    import vllm  # it prints
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine: Any = LLM(**json.loads(sys.argv[1])).llm_engine
    num_requests = 0

    def run(case: Case) -> Timing:
        nonlocal num_requests
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=case.output_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompts = case.prompts()
        clock = TokenClock()
        for prompt in prompts:
            num_requests += 1
            engine.add_request(str(num_requests), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                clock.note(output.request_id, len(output.outputs[0].token_ids))
        return clock.timing()

    channel.answer(run, {"version": vllm.__version__})


if __name__ == "__main__":  # vLLM's processes are spawned and import this file again
    main()
