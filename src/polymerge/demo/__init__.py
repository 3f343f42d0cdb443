"""The demo: two shipped experts, their texts, one command."""
