"""HTTP concerns that all routes share: middleware, errors, authentication, origins, JSON bodies and streamed responses.

It knows no route. Outsiders import its modules.
"""
