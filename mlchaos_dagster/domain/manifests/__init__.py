"""Other tools' YAML (Litmus, Chaos Mesh) as our experiments and suites: text in, drafts and remarks out. Pure.

files       any file → what it brings, or one clear line about it
litmus      ChaosEngine, and lists of `experiments`      probes      what is checked meanwhile
chaos_mesh  PodChaos, NetworkChaos, … AWSChaos           workflows   Schedule, Workflow
schedules   ChaosSchedule, cron lines → a suite's schedule
drafts      drafts → experiments in an environment, and as YAML
shapes      how a format is written down and read
"""
