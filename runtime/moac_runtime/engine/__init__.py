"""From prompts to answers, whatever the backend."""
