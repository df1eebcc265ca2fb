"""Every decision of the coordinator, pure: events and the time go in, commands come out.

core.py takes the events in. membership.py, feed.py, load.py and ranks.py know one worker each from
its own side; index.py and pools.py know all of them, predict.py and health.py how they do. desk.py
deals with requests: admission.py and fairness.py keep those for whom there is no room yet;
placement.py, candidates.py and scoring.py choose; explain.py remembers. balance.py and
expert_plans.py have workers change.
"""
