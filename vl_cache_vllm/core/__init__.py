# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: who is evicted, how many blocks it keeps, when the others are freed."""
