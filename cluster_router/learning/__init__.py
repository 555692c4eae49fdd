"""Parts of the online clustering: settings, cluster table, window of recent prompts, structure."""
