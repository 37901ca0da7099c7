# SPDX-License-Identifier: Apache-2.0
"""Accuracy of outputs with eviction, for the embedded page reader and other models."""
