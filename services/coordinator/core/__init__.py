"""Every decision of the coordinator, pure: events and the time go in, commands come out.

core.py takes the events in. membership.py, feed.py and load.py know one worker each from its own
side; index.py and pools.py know all of them; placement.py and scoring.py choose; admission.py keeps
those for whom there is no room yet.
"""
