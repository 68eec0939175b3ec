"""The load client: any OpenAI-compatible server, measured from where its users are."""
