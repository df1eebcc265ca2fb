"""OpenAI's API over what every public service of the frontend shares (begin.py).

`wire` reads what is asked (`values`, `turns`, `forms`: parts of it), `choices` runs the answers,
`answer` takes one's text apart, `chunks` and `whole` say it, `service` is the service.
"""
