#!/usr/bin/env bash
# Makes what NanoGrid needs in AWS, or takes it down again: `setup_resources.sh --help`.
#
# Each ensure_… function looks first and changes only what is missing or differs, so that a run
# that was stopped is finished by the next one. Every change goes through `change`, which a dry
# run swaps for one that prints. bash 3.2 (macOS) reads this; beside bash it needs the AWS CLI
# (v1 or v2), coreutils, and for --test-message zip or Python.
set -euo pipefail

# --------------------------------------------------------------------------- names and flags

REGION="${AWS_REGION:-${AWS_DEFAULT_REGION:-ap-northeast-2}}"
ENDPOINT="${AWS_ENDPOINT_URL:-}"
WANTED_ACCOUNT=""
QUEUE="nanogrid-task-queue"
DLQ=""
BUCKET=""
ROLE="NanoGridAgentRole"
PROFILE="NanoGridAgentProfile"
POLICY="NanoGridAgentPolicy"
CONFIG="application.yml"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

ACTION="set_up"
LEAST=""
FORCE=""
DRY_RUN=""

STEP="start"     # what is being done, for messages
FOUND=""         # what the last AWS command printed
CHANGES=0
TEMP=""
TAB=$'\t'
# The codes with which AWS says that something is not there. Nothing else means it: a 403 is no 404.
ABSENT='\((AWS\.SimpleQueueService\.NonExistentQueue|QueueDoesNotExist|NoSuchEntity|NoSuchBucket|NoSuchPublicAccessBlockConfiguration|OwnershipControlsNotFoundError|ServerSideEncryptionConfigurationNotFoundError)\)'

# The CLI v2 would otherwise open a pager, or ask for what it thinks is missing.
export AWS_PAGER="" AWS_CLI_AUTO_PROMPT=off

usage() {
  cat <<END
usage: setup_resources.sh [flags]

Makes the queue with its dead-letter queue, the bucket, the role and the instance
profile that NanoGrid needs, then writes $CONFIG into the current directory.
What is there already is kept; a setting that differs is named and set right.

  --region REGION          default: AWS_REGION, AWS_DEFAULT_REGION, else ap-northeast-2
  --account ID             go on only when the credentials (AWS_PROFILE) are of this account
  --endpoint URL           default: AWS_ENDPOINT_URL (an emulator)
  --queue NAME             default: $QUEUE
  --dlq NAME               default: the queue's name and -dlq
  --bucket NAME            default: nanogrid-code-bucket-ACCOUNTID
  --role NAME              default: $ROLE
  --instance-profile NAME  default: $PROFILE
  --least                  the role without sqs:ChangeMessageVisibility
  --force                  write $CONFIG over one that is there
  --dry-run                print what would be done; change nothing
  --test-message           upload hello-python and send the message test-001
  --down                   remove all of it, after a question; a bucket that holds
                           objects stays
  -h, --help               this text
END
}

parse_flags() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --region | --account | --endpoint | --queue | --dlq | --bucket | --role | --instance-profile)
        if [ $# -lt 2 ] || [ -z "$2" ]; then wrong_usage "$1 needs a value"; fi
        set_name "$1" "$2"
        shift
        ;;
      --least) LEAST=yes ;;
      --force) FORCE=yes ;;
      --dry-run) DRY_RUN=yes ;;
      --test-message) choose send_test_message ;;
      --down) choose take_down ;;
      -h | --help) usage; exit 0 ;;
      *) wrong_usage "there is no flag $1" ;;
    esac
    shift
  done
}

set_name() {
  case "$1" in
    --region) REGION=$2 ;;
    --account) WANTED_ACCOUNT=$2 ;;
    --endpoint) ENDPOINT=$2 ;;
    --queue) QUEUE=$2 ;;
    --dlq) DLQ=$2 ;;
    --bucket) BUCKET=$2 ;;
    --role) ROLE=$2 ;;
    --instance-profile) PROFILE=$2 ;;
  esac
}

choose() {
  [ "$ACTION" = set_up ] || wrong_usage "--down and --test-message do not go together"
  ACTION=$1
}

# Names go into JSON documents and ARNs as they are, so they are checked before anything is made.
check_names() {
  DLQ="${DLQ:-$QUEUE-dlq}"
  check_name --region "$REGION" '^[a-z0-9-]{1,40}$' "small letters, digits and -"
  check_name --queue "$QUEUE" '^[A-Za-z0-9_-]{1,80}$' "up to 80 letters, digits, _ and - (not FIFO)"
  check_name --dlq "$DLQ" '^[A-Za-z0-9_-]{1,80}$' "up to 80 letters, digits, _ and - (not FIFO)"
  check_name --role "$ROLE" '^[A-Za-z0-9+=,.@_-]{1,64}$' "up to 64 letters, digits and + = , . @ _ -"
  check_name --instance-profile "$PROFILE" '^[A-Za-z0-9+=,.@_-]{1,128}$' \
    "up to 128 letters, digits and + = , . @ _ -"
  [ -z "$BUCKET" ] || check_name --bucket "$BUCKET" '^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$' \
    "3 to 63 small letters, digits, . and -"
  [ "$QUEUE" != "$DLQ" ] || wrong_usage "--queue and --dlq are both $QUEUE: they are two queues"
}

check_name() {
  [[ "$2" =~ $3 ]] || wrong_usage "$1 is '$2'; it may be: $4"
}

# --------------------------------------------------------------------------- talking and failing

wrong_usage() {
  printf 'setup_resources.sh: %s; --help lists the flags\n' "$1" >&2
  exit 2
}

stop() {
  printf 'setup_resources.sh: %s: %s\n' "$STEP" "$1" >&2
  exit 1
}

# Ends the script after a command that failed: the step, the command, its answer, what to do.
refused() {
  local answer
  answer="$(cat "$TEMP/errors")"
  {
    printf 'setup_resources.sh: failed at: %s\n' "$STEP"
    printf '  command: %s\n' "$(as_typed "$@")"
    printf '  answer:  %s\n' "${answer#"${answer%%[![:space:]]*}"}"
    printf '  to do:   %s\n' "$(remedy "$STEP: $answer")"
    printf '  What was done before this step stays; run the script again to go on from here.\n'
  } >&2
  exit 1
}

remedy() {
  case "$1" in
    "$CONFIG:"*)
      echo "run the script in a directory that you may write to, with room on its disk; a half-written $CONFIG has to go first." ;;
    *QueueDeletedRecently*)
      echo "SQS wants 60 seconds between a queue's end and a new one of its name: wait and run again." ;;
    *NonExistentQueue* | *QueueDoesNotExist* | *NoSuchBucket*)
      echo "it is not there: run setup_resources.sh without --test-message first, with the same names." ;;
    *BucketAlreadyExists* | "bucket "*AccessDenied* | "bucket "*"(403)"*)
      echo "if the name $BUCKET is another account's, take one of your own with --bucket NAME; if the bucket is yours, its permissions for the command above are missing." ;;
    *"Unable to locate credentials"* | *"config profile"* | *InvalidClientTokenId* | *ExpiredToken* | \
      *SignatureDoesNotMatch* | *UnrecognizedClient* | *InvalidAccessKeyId* | *AuthFailure* | *"SSO "* | *"Token has expired"*)
      echo "sign in (aws configure, aws sso login) or set AWS_PROFILE; credentials of China and GovCloud also need their own --region." ;;
    *AccessDenied* | *UnauthorizedOperation* | *"(403)"*)
      echo "give the caller the permission that the answer names, or set AWS_PROFILE to one that has it." ;;
    *DeleteConflict*)
      echo "something was added to it by hand: take that away (IAM console, or aws iam detach-role-policy) and run again." ;;
    *"Could not connect"* | *"imeout on endpoint"* | *"Invalid endpoint"* | *"Connection was closed"*)
      echo "is the network up, is there a region '$REGION', and is the endpoint (${ENDPOINT:-AWS itself}) right?" ;;
    *Throttl* | *SlowDown* | *RequestLimitExceeded* | *ServiceUnavailable* | *InternalError*)
      echo "AWS was busy: wait a minute and run again." ;;
    *)
      echo "the answer says what is wrong; aws --version shows whether the CLI is an old one." ;;
  esac
}

# A command on one line, quoted where a shell would need it.
as_typed() {
  local word text=""
  for word in "$@"; do
    case "$word" in
      *[!A-Za-z0-9_./:=,@+-]*) text="$text '$word'" ;;
      *) text="$text $word" ;;
    esac
  done
  printf '%s' "${text# }"
}

unchanged() { printf 'unchanged: %s\n' "$1"; }

differs() { printf 'differs: %s: %s is %s, should be %s\n' "$STEP" "$1" "$2" "$3"; }

# --------------------------------------------------------------------------- asking AWS

# --endpoint-url, since older CLIs do not know AWS_ENDPOINT_URL, and v1 passes over it for SQS.
aws() {
  command aws --region "$REGION" ${ENDPOINT:+--endpoint-url "$ENDPOINT"} --output text "$@"
}

# Runs a command that must succeed; FOUND is what it printed.
ask() {
  FOUND="$("$@" 2>"$TEMP/errors")" || refused "$@"
}

# Whether something is there; FOUND is what the command printed. Any error but "not there" ends it.
look() {
  if FOUND="$("$@" 2>"$TEMP/errors")"; then return 0; fi
  [[ "$(cat "$TEMP/errors")" =~ $ABSENT ]] || refused "$@"
  FOUND=""
  return 1
}

# change VERB WHAT COMMAND…: runs the command, says so, counts it. A dry run has the second one.
change() {
  local verb="$1" what="$2"
  shift 2
  ask "$@"
  CHANGES=$((CHANGES + 1))
  printf '%s: %s\n' "$verb" "$what"
}

only_print_changes() {
  change() {
    CHANGES=$((CHANGES + 1))
    printf 'would be %s: %s\n' "$1" "$2"
    shift 2
    FOUND=""
    if [ "$1" = aws ]; then printf '    %s\n' "$(as_typed "$@")"; fi
  }
}

compact() { tr -d ' \t\r\n'; }

# --------------------------------------------------------------------------- who and where

prepare() {
  type -P aws >/dev/null || stop "the AWS CLI (aws) is not on PATH: install it, then run this again"
  TEMP="$(mktemp -d "${TMPDIR:-/tmp}/nanogrid.XXXXXX")" || stop "no temporary directory can be made: set TMPDIR to one that you may write to"
  trap 'rm -rf "$TEMP"' EXIT
  if [ -n "$DRY_RUN" ]; then only_print_changes; fi
}

# Account and partition (aws, aws-cn, aws-us-gov) are read from the caller's own ARN.
identify() {
  local arn
  STEP="credentials"
  ask aws sts get-caller-identity --query "[Account,Arn]"
  ACCOUNT="${FOUND%%"$TAB"*}"
  arn="${FOUND#*"$TAB"}"
  PARTITION="${arn#arn:}"
  PARTITION="${PARTITION%%:*}"
  if ! [[ "$ACCOUNT" =~ ^[0-9]{12}$ && "$PARTITION" =~ ^aws[a-z-]*$ ]]; then
    stop "sts get-caller-identity answered '$FOUND', which is no account id and ARN"
  fi
  if [ -n "$WANTED_ACCOUNT" ] && [ "$WANTED_ACCOUNT" != "$ACCOUNT" ]; then
    stop "these are credentials of account $ACCOUNT, not $WANTED_ACCOUNT: set AWS_PROFILE to the right profile"
  fi
  BUCKET="${BUCKET:-nanogrid-code-bucket-$ACCOUNT}"
  QUEUE_ARN="arn:$PARTITION:sqs:$REGION:$ACCOUNT:$QUEUE"
  DLQ_ARN="arn:$PARTITION:sqs:$REGION:$ACCOUNT:$DLQ"
  printf 'account %s, region %s, as %s\n' "$ACCOUNT" "$REGION" "$arn"
}

# Services' names end in .cn in China only; so does EC2 as a principal there.
dns_suffix() {
  if [ "$PARTITION" = aws-cn ]; then echo amazonaws.com.cn; else echo amazonaws.com; fi
}

# --------------------------------------------------------------------------- queues

# Whether the queue is there; QUEUE_URL is its URL afterwards, there or not.
find_queue() {
  local there=yes
  STEP="queue $1"
  look aws sqs get-queue-url --queue-name "$1" --query QueueUrl || there=""
  QUEUE_URL="$(queue_url "$1")"
  [ -n "$there" ]
}

# ensure_queue NAME ATTRIBUTE=VALUE…; QUEUE_URL is its URL afterwards.
ensure_queue() {
  local name="$1" pair names="" json=""
  shift
  for pair in "$@"; do
    names="$names,${pair%%=*}"
    json="$json$(member "$pair")"
  done
  if ! find_queue "$name"; then
    change made "$STEP" aws sqs create-queue --queue-name "$name" --attributes "{${json#,}}" --query QueueUrl
    QUEUE_URL="$(queue_url "$name")"
    return
  fi
  ask aws sqs get-queue-attributes --queue-url "$QUEUE_URL" --attribute-names All \
    --query "Attributes.[${names#,}]"
  correct_queue "$@"
}

# The URL as the console shows it: the CLI v1 asks at an older address and is answered with that.
# An emulator's is in FOUND.
queue_url() {
  if [ -n "$ENDPOINT" ] && [ -n "$FOUND" ]; then
    printf '%s' "$FOUND"
  else
    printf 'https://sqs.%s.%s/%s/%s' "$REGION" "$(dns_suffix)" "$ACCOUNT" "$1"
  fi
}

# Sets those attributes right whose value in FOUND (one column each) is another.
correct_queue() {
  local pair name value now wrong=""
  for pair in "$@"; do
    name="${pair%%=*}"
    value="$(plain "${pair#*=}")"
    now="$(plain "${FOUND%%"$TAB"*}")"
    FOUND="${FOUND#*"$TAB"}"
    if [ "$now" != "$value" ] && [ "${now#*,},${now%%,*}" != "$value" ]; then
      differs "$name" "$now" "$value"
      wrong="$wrong$(member "$pair")"
    fi
  done
  if [ -z "$wrong" ]; then
    unchanged "$STEP"
    return
  fi
  change set "$STEP" aws sqs set-queue-attributes --queue-url "$QUEUE_URL" --attributes "{${wrong#,}}"
}

# ATTRIBUTE=VALUE as a member of the JSON object that the CLI takes; quotes in it are escaped already.
member() { printf ',"%s":"%s"' "${1%%=*}" "${1#*=}"; }

# An attribute without what may differ in how its JSON is written: quotes, escapes, spaces, braces.
plain() { printf '%s' "$1" | tr -d ' "\\{}'; }

# The DLQ keeps messages as long as its source does: a message's age counts from its first queue.
ensure_queues() {
  ensure_queue "$DLQ" MessageRetentionPeriod=1209600
  ensure_queue "$QUEUE" VisibilityTimeout=300 MessageRetentionPeriod=1209600 \
    ReceiveMessageWaitTimeSeconds=20 MaximumMessageSize=262144 \
    "RedrivePolicy={\\\"deadLetterTargetArn\\\":\\\"$DLQ_ARN\\\",\\\"maxReceiveCount\\\":3}"
}

# --------------------------------------------------------------------------- bucket

ensure_bucket() {
  STEP="bucket $BUCKET"
  if look aws s3api get-bucket-location --bucket "$BUCKET" --expected-bucket-owner "$ACCOUNT" \
    --query LocationConstraint; then
    check_bucket_region "$FOUND"
    unchanged "$STEP"
  elif [ "$REGION" = us-east-1 ]; then
    # The one region that S3 does not take as a LocationConstraint.
    change made "$STEP" aws s3api create-bucket --bucket "$BUCKET"
  else
    change made "$STEP" aws s3api create-bucket --bucket "$BUCKET" \
      --create-bucket-configuration "LocationConstraint=$REGION"
  fi
  ensure_bucket_settings
}

# S3 still answers with the names of 2006 for two regions.
check_bucket_region() {
  local region="$1"
  case "$region" in
    None) region=us-east-1 ;;
    EU) region=eu-west-1 ;;
  esac
  [ "$region" = "$REGION" ] || stop "it is in $region, not in $REGION, and no bucket can be moved: take another with --bucket NAME, or --region $region"
}

ensure_bucket_settings() {
  bucket_setting "public access block" "True True True True" get-public-access-block \
    "PublicAccessBlockConfiguration.[BlockPublicAcls,IgnorePublicAcls,BlockPublicPolicy,RestrictPublicBuckets]" \
    put-public-access-block --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
  # BucketOwnerEnforced is what the console calls "ACLs disabled".
  bucket_setting "object ownership" BucketOwnerEnforced get-bucket-ownership-controls \
    "OwnershipControls.Rules[0].ObjectOwnership" \
    put-bucket-ownership-controls --ownership-controls "Rules=[{ObjectOwnership=BucketOwnerEnforced}]"
  bucket_setting encryption AES256 get-bucket-encryption \
    "ServerSideEncryptionConfiguration.Rules[0].ApplyServerSideEncryptionByDefault.SSEAlgorithm" \
    put-bucket-encryption --server-side-encryption-configuration \
    '{"Rules":[{"ApplyServerSideEncryptionByDefault":{"SSEAlgorithm":"AES256"}}]}'
}

# bucket_setting NAME VALUE GET-COMMAND QUERY PUT-COMMAND OPTION…
bucket_setting() {
  local name="$1" value="$2" get="$3" query="$4"
  shift 4
  look aws s3api "$get" --bucket "$BUCKET" --query "$query" || FOUND="not set"
  FOUND="${FOUND//$TAB/ }"
  if [ "$FOUND" = "$value" ]; then
    unchanged "$STEP: $name"
    return
  fi
  differs "$name" "$FOUND" "$value"
  change set "$STEP: $name" aws s3api "$1" --bucket "$BUCKET" "${@:2}"
}

# --------------------------------------------------------------------------- role

trust_policy() {
  cat <<END
{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Principal": {"Service": "ec2.$(dns_suffix)"}, "Action": "sts:AssumeRole"}]}
END
}

# sqs:SendMessage is not in it: whoever sends the tasks has that, never the agent.
role_policy() {
  local extend=', "sqs:ChangeMessageVisibility"'
  if [ -n "$LEAST" ]; then extend=""; fi
  cat <<END
{"Version": "2012-10-17", "Statement": [
  {"Sid": "SQSAccess", "Effect": "Allow",
   "Action": ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"$extend],
   "Resource": "$QUEUE_ARN"},
  {"Sid": "S3Access", "Effect": "Allow",
   "Action": ["s3:GetObject", "s3:ListBucket"],
   "Resource": ["arn:$PARTITION:s3:::$BUCKET", "arn:$PARTITION:s3:::$BUCKET/*"]},
  {"Sid": "CloudWatchAccess", "Effect": "Allow",
   "Action": ["cloudwatch:PutMetricData"], "Resource": "*"}]}
END
}

ensure_role() {
  local wanted
  wanted="$(trust_policy | compact)"
  STEP="role $ROLE"
  if ! look aws iam get-role --role-name "$ROLE" --query Role.AssumeRolePolicyDocument --output json; then
    change made "$STEP" aws iam create-role --role-name "$ROLE" --assume-role-policy-document "$wanted"
  elif differs_from "trust policy" "$wanted"; then
    change set "$STEP" aws iam update-assume-role-policy --role-name "$ROLE" --policy-document "$wanted"
  fi
}

ensure_role_policy() {
  local wanted verb=set
  wanted="$(role_policy | compact)"
  STEP="role policy $POLICY"
  if ! look aws iam get-role-policy --role-name "$ROLE" --policy-name "$POLICY" \
    --query PolicyDocument --output json; then
    verb=made
  elif ! differs_from document "$wanted"; then
    return
  fi
  change "$verb" "$STEP" aws iam put-role-policy --role-name "$ROLE" --policy-name "$POLICY" \
    --policy-document "$wanted"
}

# Whether the JSON in FOUND is another than WANTED (compact); says which of the two it is.
differs_from() {
  local now
  now="$(printf '%s' "$FOUND" | compact)"
  if [ "$now" = "$2" ]; then
    unchanged "$STEP"
    return 1
  fi
  printf 'differs: %s: the %s is\n    %s\n  and should be\n    %s\n' "$STEP" "$1" "$now" "$2"
}

# Whether the profile is there; FOUND is the role in it, or None.
find_profile() {
  STEP="instance profile $PROFILE"
  look aws iam get-instance-profile --instance-profile-name "$PROFILE" \
    --query "InstanceProfile.Roles[0].RoleName"
}

# A profile holds one role at most, so another one in it has to go first.
ensure_instance_profile() {
  if ! find_profile; then
    change made "$STEP" aws iam create-instance-profile --instance-profile-name "$PROFILE"
    FOUND=None
  elif [ "$FOUND" = "$ROLE" ]; then
    unchanged "$STEP"
    return
  else
    differs role "$FOUND" "$ROLE"
  fi
  empty_profile
  change set "$STEP: role $ROLE" aws iam add-role-to-instance-profile \
    --instance-profile-name "$PROFILE" --role-name "$ROLE"
}

empty_profile() {
  if [ "$FOUND" != None ]; then
    change removed "$STEP: role $FOUND" aws iam remove-role-from-instance-profile \
      --instance-profile-name "$PROFILE" --role-name "$FOUND"
  fi
}

# --------------------------------------------------------------------------- application.yml

# The example with this set's own values, less the hints for whoever fills it in by hand.
render_config() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in
      *"# ↑ "* | "    # e.g. "*) ;;
      "    region: "*) printf '    region: %s\n' "$REGION" ;;
      "    endpointUrl:"*) printf '    endpointUrl:%s\n' "${ENDPOINT:+ $ENDPOINT}" ;;
      "    queueUrl: "*YOUR_ACCOUNT_ID*) printf '    queueUrl: %s\n' "$QUEUE_URL" ;;
      "    codeBucket: "*) printf '    codeBucket: %s\n' "$BUCKET" ;;
      *) printf '%s\n' "$line" ;;
    esac
  done <"$HERE/$CONFIG.example"
}

write_config() { printf '%s\n' "$WANTED_CONFIG" >"$CONFIG"; }

ensure_config() {
  local now
  STEP="$CONFIG"
  WANTED_CONFIG="$(render_config)"
  if ! [ -e "$CONFIG" ]; then
    change written "$STEP" write_config
    return
  fi
  now="$(cat "$CONFIG")"
  if [ "$now" = "$WANTED_CONFIG" ]; then
    unchanged "$STEP"
  elif [ -n "$FORCE" ]; then
    change written "$STEP" write_config
  elif [[ "$now" == *"$QUEUE_URL"* && "$now" == *"$BUCKET"* ]]; then
    unchanged "$STEP (edited since it was written; --force writes it anew)"
  else
    printf 'left: %s is there and does not name this queue and bucket: put them in,\n' "$STEP"
    printf '      queueUrl: %s\n      codeBucket: %s\n' "$QUEUE_URL" "$BUCKET"
    printf '      or let --force write it anew\n'
  fi
}

check_example() {
  STEP="$CONFIG.example"
  [ -r "$HERE/$CONFIG.example" ] || stop "it is not beside setup_resources.sh ($HERE): fetch it, $CONFIG is written from it"
}

# --------------------------------------------------------------------------- what the flags ask for

set_up() {
  check_example
  ensure_queues
  ensure_bucket
  ensure_role
  ensure_role_policy
  ensure_instance_profile
  ensure_config
  summary "everything is as it should be"
}

summary() {
  if [ "$CHANGES" -eq 0 ]; then
    printf 'Nothing changed: %s.\n' "$1"
  elif [ -n "$DRY_RUN" ]; then
    printf 'Dry run: nothing was changed; changes that would be made: %s.\n' "$CHANGES"
  else
    printf 'Done; changes: %s.\n' "$CHANGES"
  fi
}

send_test_message() {
  local key="functions/hello-python/v1.zip"
  find_queue "$QUEUE" || stop "it is not there: run setup_resources.sh without --test-message first, with the same names"
  make_test_zip
  STEP="upload to bucket $BUCKET"
  change uploaded "s3://$BUCKET/$key" aws s3 cp --only-show-errors "$TEMP/hello-python.zip" "s3://$BUCKET/$key"
  cat >"$TEMP/test-message.json" <<END
{
  "requestId": "test-001",
  "functionId": "hello-python",
  "runtime": "python",
  "s3Bucket": "$BUCKET",
  "s3Key": "$key",
  "timeoutMs": 5000,
  "memoryMb": 256
}
END
  STEP="message to queue $QUEUE"
  change sent "test-001 to $QUEUE_URL" aws sqs send-message --queue-url "$QUEUE_URL" \
    --message-body "file://$TEMP/test-message.json" --query MessageId
  if [ -z "$DRY_RUN" ]; then what_to_look_for; fi
}

# No subshells here: bash 3.2 goes on after one that failed.
make_test_zip() {
  local python
  STEP="zip of hello-python"
  cat >"$TEMP/main.py" <<'END'
#!/usr/bin/env python3
print("Hello from NanoGrid!")
print("Result: 42")
END
  if type -P zip >/dev/null; then
    ask zip -q -j "$TEMP/hello-python.zip" "$TEMP/main.py"
    return
  fi
  python="$(type -P python3 || type -P python)" || stop "neither zip nor Python is on PATH: install one of them"
  ask "$python" -m zipfile -c "$TEMP/hello-python.zip" "$TEMP/main.py"
}

what_to_look_for() {
  cat <<'END'
Look for these in the agent's log (python nanogrid.py --config application.yml):
  INFO [test-001] stdout: Hello from NanoGrid!
  INFO REPORT requestId=test-001 functionId=hello-python runtime=python status=ok …
  Successfully published 1 values …
A few minutes later CloudWatch has, among its custom namespaces, NanoGrid/FunctionRunner with
PeakMemoryBytes of FunctionId hello-python, Runtime python.
END
}

# --------------------------------------------------------------------------- taking it down

# In the reverse order of making; the agent loses its rights before its queue goes.
take_down() {
  agree
  remove_instance_profile
  remove_role
  remove_queue "$DLQ"
  remove_queue "$QUEUE"
  remove_bucket
  remove_config
  summary "none of it was there"
}

agree() {
  local answer=""
  STEP="--down"
  if [ -n "$DRY_RUN" ]; then return; fi
  printf 'This removes instance profile %s, role %s,\n' "$PROFILE" "$ROLE"
  printf 'queues %s and %s with all messages in them,\n' "$QUEUE" "$DLQ"
  printf 'and bucket %s if it is empty. Type yes to go on: ' "$BUCKET"
  read -r answer || true
  if ! [ -t 0 ]; then printf '\n'; fi
  [ "$answer" = yes ] || stop "the answer was not yes: nothing was removed"
}

gone() { printf 'not there: %s\n' "$1"; }

remove_instance_profile() {
  if ! find_profile; then
    gone "$STEP"
    return
  fi
  empty_profile
  change removed "$STEP" aws iam delete-instance-profile --instance-profile-name "$PROFILE"
}

remove_role() {
  STEP="role $ROLE"
  if ! look aws iam get-role --role-name "$ROLE" --query Role.RoleName; then
    gone "$STEP"
    return
  fi
  if look aws iam get-role-policy --role-name "$ROLE" --policy-name "$POLICY" --query PolicyName; then
    change removed "$STEP: policy $POLICY" aws iam delete-role-policy --role-name "$ROLE" \
      --policy-name "$POLICY"
  fi
  change removed "$STEP" aws iam delete-role --role-name "$ROLE"
}

# The main queue goes last: application.yml is known by QUEUE_URL.
remove_queue() {
  if find_queue "$1"; then
    change removed "$STEP" aws sqs delete-queue --queue-url "$QUEUE_URL"
  else
    gone "$STEP"
  fi
}

# Old versions and delete markers are objects too: S3 deletes no bucket that holds any.
remove_bucket() {
  STEP="bucket $BUCKET"
  if ! look aws s3api list-object-versions --bucket "$BUCKET" --no-paginate --max-keys 1 \
    --expected-bucket-owner "$ACCOUNT" --query "[Versions[0].Key,DeleteMarkers[0].Key]"; then
    gone "$STEP"
  elif [ "$FOUND" = "None${TAB}None" ]; then
    change removed "$STEP" aws s3api delete-bucket --bucket "$BUCKET"
  else
    FOUND="${FOUND#None"$TAB"}"  # one key, or two
    printf 'left: %s holds objects (such as %s): keep it, or empty it\n' "$STEP" "${FOUND%%"$TAB"*}"
    printf '      (aws s3 rm s3://%s --recursive; old versions: in the console) and run --down again\n' "$BUCKET"
  fi
}

# Only a file that nobody has edited is ours to remove.
remove_config() {
  STEP="$CONFIG"
  if ! [ -e "$CONFIG" ]; then
    gone "$STEP"
  elif [ -r "$HERE/$CONFIG.example" ] && [ "$(cat "$CONFIG")" = "$(render_config)" ]; then
    change removed "$STEP" rm "$CONFIG"
  else
    printf 'left: %s is not as this script writes it: remove it yourself, or keep it\n' "$STEP"
  fi
}

# ---------------------------------------------------------------------------

main() {
  parse_flags "$@"
  check_names
  prepare
  identify
  "$ACTION"
}

main "$@"
