{{/* What every object is known by. */}}
{{- define "sprue.name" -}}{{ .Release.Name | trunc 30 | trimSuffix "-" }}{{- end }}

{{- define "sprue.labels" -}}
app.kubernetes.io/name: sprue
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What selects pods: of the release, and of a component of it (serving, training, mlflow, postgres, s3). */}}
{{- define "sprue.selector" -}}
app.kubernetes.io/name: sprue
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "sprue.pods" -}}
{podSelector: {matchLabels: {app.kubernetes.io/name: sprue, app.kubernetes.io/instance: {{ .root.Release.Name }}, app.kubernetes.io/component: {{ .component }}}}}
{{- end }}

{{/* An image by its digest; by its tag only where that is allowed. */}}
{{- define "sprue.image" -}}
{{- $image := .image -}}
{{- $repository := required (printf "%s.repository is not set" .name) $image.repository -}}
{{- if $image.digest -}}
{{ $repository }}@{{ $image.digest }}
{{- else if .root.Values.image.allowTags -}}
{{ $repository }}:{{ required (printf "%s needs a tag or a digest" .name) $image.tag }}
{{- else -}}
{{- fail (printf "%s.digest is not set: pin the image, or set image.allowTags on a laptop" .name) -}}
{{- end -}}
{{- end }}

{{- define "sprue.trackingUri" -}}
{{- if .Values.bundled.mlflow.enabled -}}
http://{{ include "sprue.name" . }}-mlflow:5000
{{- else -}}
{{ required "tracking.uri is not set, and MLflow is not bundled" .Values.tracking.uri }}
{{- end -}}
{{- end }}

{{- define "sprue.s3Endpoint" -}}
{{- if .Values.bundled.s3.enabled -}}http://{{ include "sprue.name" . }}-s3:8333{{- else -}}{{ .Values.s3.endpoint }}{{- end -}}
{{- end }}

{{/* Pod Security "restricted", and more: nothing is written but to volumes. */}}
{{- define "sprue.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .uid }}
runAsGroup: {{ .uid }}
fsGroup: {{ .uid }}
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "sprue.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sprue.s3Environment" -}}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.s3 }}, key: access-key-id}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.s3 }}, key: secret-access-key}}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.s3.region | quote }}}
{{- with include "sprue.s3Endpoint" . }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{/* Where a node of Ray finds the store and the tracking server. KubeRay adds Ray's token. */}}
{{- define "sprue.environment" -}}
- {name: SPRUE_STORE, value: {{ required "store is not set" .Values.store | quote }}}
- {name: MLFLOW_TRACKING_URI, value: {{ include "sprue.trackingUri" . | quote }}}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.mlflow }}, key: username}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.mlflow }}, key: password}}
{{ include "sprue.s3Environment" . }}
{{- end }}

{{/* The template of a Ray pod: root, component, role (head or worker), image, group (its resources and place). */}}
{{- define "sprue.rayPod" -}}
{{- $root := .root }}
metadata:
  labels: {{- include "sprue.selector" (dict "root" $root "component" .component) | nindent 4 }}
    sprue/role: {{ .role }}
spec:
  {{- if eq .role "worker" }}
  automountServiceAccountToken: false # a head's autoscaler needs the token that KubeRay gives it
  terminationGracePeriodSeconds: 120 # a replica answers its requests, then writes its last decisions
  {{- end }}
  {{- if $root.Values.priorityClasses.create }}
  priorityClassName: {{ include "sprue.name" $root }}-{{ .component }}
  {{- end }}
  securityContext: {{- include "sprue.podSecurity" (dict "uid" 10001) | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{- range . }}
    - {name: {{ . }}}
    {{- end }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and (eq .component "serving") (eq .role "worker") }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "sprue.selector" (dict "root" $root "component" .component) | nindent 10 }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ .image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "sprue.containerSecurity" . | nindent 8 }}
      env: {{- include "sprue.environment" $root | nindent 8 }}
        {{- if and (eq .component "serving") $root.Values.serving.tracing.endpoint }}
        - {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ $root.Values.serving.tracing.endpoint | quote }}}
        - {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
        - {name: OTEL_TRACES_SAMPLER_ARG, value: {{ $root.Values.serving.tracing.ratio | quote }}}
        {{- end }}
      {{- $resources := deepCopy .group.resources }}
      {{- if .group.gpus }}
      {{- $gpu := dict "nvidia.com/gpu" .group.gpus }}
      {{- $resources = merge $resources (dict "limits" $gpu "requests" $gpu) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      ports:
        {{- if eq .role "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        {{- if eq .component "serving" }}
        - {name: serve, containerPort: 8000}
        {{- end }}
      # What KubeRay would add calls wget for a worker that serves, which the images do without.
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        initialDelaySeconds: 30
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 24
      readinessProbe:
        {{- if and (eq .component "serving") (eq .role "worker") }}
        httpGet: {path: /-/healthz, port: serve}
        {{- else }}
        httpGet: {path: /api/healthz, port: 52365}
        {{- end }}
        initialDelaySeconds: 10
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/sprue}
        {{- if eq .component "serving" }}
        - {name: keys, mountPath: /etc/sprue/keys, readOnly: true} # a folder, so that changes of the secret reach it
        {{- else if $root.Values.pipeline.params }}
        - {name: params, mountPath: /etc/sprue/params, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    {{- if eq .component "serving" }}
    - name: keys
      secret: {secretName: {{ $root.Values.secrets.keys }}, defaultMode: 0440}
    {{- else if $root.Values.pipeline.params }}
    - name: params
      configMap: {name: {{ include "sprue.name" $root }}-params}
    {{- end }}
{{- end }}

{{/* Whether a cluster grows and shrinks: root, lasting. Kueue admits a cluster as a whole, unless it may be elastic. */}}
{{- define "sprue.autoscaling" -}}
{{- or (not .root.Values.kueue.enabled) (and .lasting .root.Values.kueue.elastic) -}}
{{- end }}

{{/* A RayCluster's spec: root, component, image, plane (values of serving or training), lasting (is no job's). */}}
{{- define "sprue.rayCluster" -}}
{{- $root := .root }}
{{- $autoscaling := eq (include "sprue.autoscaling" .) "true" }}
{{- $replicas := 0 }}
{{- range .plane.workerGroups }}{{ $replicas = add $replicas .replicas }}{{ end }}
{{- if not (or $autoscaling $replicas) }}
{{- fail (printf "%s.workerGroups have no replicas, and with Kueue a cluster does not grow: give them some" .component) }}
{{- end }}
rayVersion: {{ $root.Values.rayVersion | quote }}
authOptions: {mode: token, secretName: {{ $root.Values.secrets.ray }}}
enableInTreeAutoscaling: {{ $autoscaling }}
{{- if $autoscaling }}
autoscalerOptions:
  idleTimeoutSeconds: {{ .plane.idleTimeoutSeconds | default 300 }}
  resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {cpu: 500m, memory: 512Mi}}
  securityContext: {{- include "sprue.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/sprue}
{{- end }}
{{- if and .lasting $root.Values.gcs.redisAddress }}
gcsFaultToleranceOptions:
  redisAddress: {{ $root.Values.gcs.redisAddress }}
  {{- with $root.Values.secrets.redis }}
  redisPassword: {valueFrom: {secretKeyRef: {name: {{ . }}, key: password}}}
  {{- end }}
{{- end }}
headGroupSpec:
  rayStartParams: {num-cpus: "0", dashboard-host: 0.0.0.0} # no work beside the cluster's state
  template: {{- include "sprue.rayPod" (dict "root" $root "component" .component "role" "head" "image" .image "group" .plane.head) | nindent 4 }}
workerGroupSpecs:
  {{- $here := . }}
  {{- range .plane.workerGroups }}
  - groupName: {{ .name }}
    replicas: {{ .replicas }}
    minReplicas: {{ .minReplicas }}
    maxReplicas: {{ .maxReplicas }}
    rayStartParams: {}
    template: {{- include "sprue.rayPod" (dict "root" $root "component" $here.component "role" "worker" "image" $here.image "group" .) | nindent 6 }}
  {{- end }}
{{- end }}

{{/* A RayJob's spec: root, entrypoint. The job has a cluster of its own, which goes with it. */}}
{{- define "sprue.rayJob" -}}
{{- $root := .root }}
{{- $image := include "sprue.image" (dict "root" $root "name" "image.platform" "image" $root.Values.image.platform) }}
entrypoint: {{ .entrypoint | quote }}
submissionMode: K8sJobMode
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ $root.Values.pipeline.keepSeconds }}
activeDeadlineSeconds: {{ $root.Values.pipeline.deadlineSeconds }}
backoffLimit: 1 # a fit resumes after its last checkpoint
submitterPodTemplate:
  metadata:
    labels: {{- include "sprue.selector" (dict "root" $root "component" "training") | nindent 6 }}
      sprue/role: submitter
  spec:
    restartPolicy: Never
    automountServiceAccountToken: false
    securityContext: {{- include "sprue.podSecurity" (dict "uid" 10001) | nindent 6 }}
    {{- with $root.Values.image.pullSecrets }}
    imagePullSecrets: {{- range . }}
      - {name: {{ . }}}
      {{- end }}
    {{- end }}
    containers:
      - name: ray-job-submitter
        image: {{ $image }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        securityContext: {{- include "sprue.containerSecurity" . | nindent 10 }}
        resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {cpu: 500m, memory: 512Mi}}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: home, mountPath: /home/sprue}
    volumes:
      - {name: tmp, emptyDir: {}}
      - {name: home, emptyDir: {}}
rayClusterSpec: {{- include "sprue.rayCluster" (dict "root" $root "component" "training" "image" $image "plane" $root.Values.training "lasting" false) | nindent 2 }}
{{- end }}

{{/* Kueue's queues. Training's has the name that Kueue gives to what names none: what RayCronJobs and people make. */}}
{{- define "sprue.localQueue" -}}
{{- if eq .component "training" -}}default{{- else -}}{{ include "sprue.name" .root }}-{{ .component }}{{- end -}}
{{- end }}
{{/* The labels by which Kueue admits an object: root, component. */}}
{{- define "sprue.queue" -}}
{{- if .root.Values.kueue.enabled }}
kueue.x-k8s.io/queue-name: {{ include "sprue.localQueue" . }}
kueue.x-k8s.io/priority-class: {{ include "sprue.name" .root }}-{{ .component }}
{{- end }}
{{- end }}
{{- define "sprue.elastic" -}}
{{- if and .Values.kueue.enabled .Values.kueue.elastic }}
annotations: {kueue.x-k8s.io/elastic-job: "true"}
{{- end }}
{{- end }}
