# SPDX-License-Identifier: Apache-2.0
"""The command ``vl-cache-check``: proves this package right on the GPU that it runs on.

| module | owns |
| --- | --- |
| `cli` | the command: order of the steps, table, exit code |
| `steps` | one process and one time limit for each step |
| `rows` | what a comparison found, and its limit |
| `synthetic` | calls of the device operations; the only module here that knows their arguments |
| `operations` | Triton operations against the torch operations, and their times |
| `engines` | small engines against each other and against vLLM without eviction |
| `model` | the small model of these engines, without files of weights |
| `record` | the file that lets ``--kv-compress`` start on this GPU |
"""
