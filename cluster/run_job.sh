#!/bin/sh
# Runs the command of the RayJob named $RAYJOB. Exit code 2 (a wrong setting, input or model) takes
# the remaining retries from the RayJob, as none of them could succeed; the code is passed on.
"$@"
code=$?
if [ "$code" -eq 2 ]; then
    account=${ACCOUNT_DIR:-/var/run/secrets/kubernetes.io/serviceaccount}
    wget --quiet --output-document=/dev/null --method=PATCH \
        --ca-certificate="$account/ca.crt" \
        --header="Authorization: Bearer $(cat "$account/token")" \
        --header="Content-Type: application/merge-patch+json" \
        --body-data='{"spec":{"backoffLimit":0}}' \
        "https://${KUBERNETES_SERVICE_HOST}:${KUBERNETES_SERVICE_PORT}/apis/ray.io/v1/namespaces/$(cat "$account/namespace")/rayjobs/$RAYJOB" ||
        echo "run_job.sh: cannot stop the retries of RayJob $RAYJOB; delete it to stop them" >&2
fi
exit "$code"
