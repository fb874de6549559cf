"""A caption model behind HTTP: chat -> batcher -> pipeline (threads) -> an engine."""
