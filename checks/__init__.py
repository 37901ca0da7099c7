# SPDX-License-Identifier: Apache-2.0
"""Long checks that pass or fail: the contract with vLLM, the model matrix and the soak test."""
