#!/bin/sh
# The preStop hook of a worker pod: Ray gives this node no more work, and the pod stays until its
# shard is committed, at most for $1 seconds (less than terminationGracePeriodSeconds).
deadline=$(($(date +%s) + $1))
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being removed" \
    --deadline-remaining-seconds "$1" || exit 0
# The driver ends the actor once its shard is committed.
while [ "$(date +%s)" -lt "$deadline" ] && grep -aqs "^ray::Worker" /proc/[0-9]*/cmdline; do
    sleep 1
done
