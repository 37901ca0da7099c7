# SPDX-License-Identifier: Apache-2.0
"""Reports ride on a step's output, whether it is there already or not."""

import pickle

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vl_cache_vllm.messages import EvictionReport, put_reports, take_reports

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
    assert take_reports(carrier) == []
    assert put_reports(carrier, [lambda: REPORT]) is carrier
    assert take_reports(carrier) == [PLAIN]
    assert take_reports(pickle.loads(pickle.dumps(carrier))) == [PLAIN]  # from another process


def test_an_output_without_reports_is_left_alone() -> None:
    carrier = output()
    assert put_reports(carrier, []) is carrier
    assert vars(carrier) == vars(output())


def test_an_output_that_is_not_there_yet() -> None:
    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return output()

        def get_kv_connector_output(self) -> str:  # abstract since vLLM 0.33
            return "a connector's"

    later = Later()
    assert put_reports(later, []) is later
    carrier = put_reports(later, [lambda: REPORT])
    assert take_reports(carrier.get_output()) == [PLAIN]
    assert carrier.get_kv_connector_output() == "a connector's"
