"""The demo model: a small mixture of experts, made once from a dense model's weights and kept in the user's cache."""
