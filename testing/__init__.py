# SPDX-License-Identifier: Apache-2.0
"""Shared by tests, checks, evaluation and benchmarks: models, engines, oracles, result files."""
