"""HTTP concerns that all routes share: middleware, errors, authentication, origins, JSON bodies and streamed responses.

It knows no route, no audio and no engine. Outsiders import its modules.
"""
