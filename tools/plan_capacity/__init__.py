"""What a job will take: hours, bytes, traffic, GPU-hours and cost by stage, before a GPU is rented for it.

``python -m tools.plan_capacity`` plans, ``.calibrate`` measures this machine's rates by running the real stages for a
short while, ``.check`` puts a plan beside a real run, ``.goodput`` simulates a long run's faults.
"""
