# SPDX-License-Identifier: Apache-2.0
"""Accuracy on a pretrained language model that reads documents as image embeddings."""
