"""`lsg serve`: a model behind the OpenAI chat-completions protocol.

A request is read (`request`, `pictures`), made a question of the model (`question`), put into a batch and answered (`engine`,
`batching`, `programs`), and its tokens become text (`answer_text`) and replies (`reply`). `server` has the endpoints.
"""
