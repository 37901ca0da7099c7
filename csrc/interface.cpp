// SPDX-License-Identifier: Apache-2.0
// The number of the functions' signatures. vl_cache_vllm/ops/native.py has the same number and does
// not load a library that was built from other sources.

extern "C" int vlc_interface() { return 5; }
