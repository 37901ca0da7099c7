# SPDX-License-Identifier: Apache-2.0
"""Reports ride on a step's output, whether it is there already or not."""

import pickle

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vl_cache_vllm.core.messages import EvictionReport, attach, detach

REPORT = EvictionReport(0.01, 0.002, {0: 0.1, 1: 0.3})
PLAIN = {
    "observation_seconds": 0.01,
    "compaction_seconds": 0.002,
    "layers_retained": {0: 0.1, 1: 0.3},
}


def output() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})


def test_a_finished_output() -> None:
    carrier = output()
    assert detach(carrier) == []
    assert attach(carrier, [lambda: REPORT]) is carrier
    assert detach(carrier) == [PLAIN]
    assert detach(pickle.loads(pickle.dumps(carrier))) == [PLAIN]  # from another process


def test_an_output_without_reports_is_left_alone() -> None:
    carrier = output()
    assert attach(carrier, []) is carrier
    assert vars(carrier) == vars(output())


def test_an_output_that_is_not_there_yet() -> None:
    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return output()

        def get_kv_connector_output(self) -> str:  # abstract since vLLM 0.33
            return "a connector's"

    later = Later()
    assert attach(later, []) is later
    carrier = attach(later, [lambda: REPORT])
    assert detach(carrier.get_output()) == [PLAIN]
    assert carrier.get_kv_connector_output() == "a connector's"
