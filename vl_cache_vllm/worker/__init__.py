# SPDX-License-Identifier: Apache-2.0
"""Device side: what each request has observed and kept, and what a step must do about it."""
