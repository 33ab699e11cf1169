"""The race: this optimizer beside what a user would pick instead, on equal wall-clock."""
